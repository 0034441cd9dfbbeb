"""VPL by its recipe, and with the features of the averaged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.training import assert_same_state, losses, tiny, train, trainer_of, write_faces

import unitsface_kernels as uk
from train import checkpoint
from train import losses as train_losses
from train.config import make_config
from train.errors import UserError

RECIPE = Path(train_losses.__file__).parent / "configs/loss/vpl.yaml"


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


def _momentum(faces: Path, run: Path, on: bool = True, **partial: Any):
    loss = {"class": "vpl", "pair": "none", "class_momentum": on}
    steps = {"max_steps": 3, "ema": 0.5}
    return tiny(faces, run, loss=loss, train=steps, partial_fc=partial)


@pytest.mark.parametrize("enabled", ["never", "always"])
def test_the_recipe_builds_its_loss(faces: Path, tmp_path: Path, enabled: str) -> None:
    recipe = yaml.safe_load(RECIPE.read_text())["loss"]
    trainer = trainer_of(tiny(faces, tmp_path, loss=recipe, partial_fc={"enabled": enabled}))
    module = trainer.loss.class_loss if enabled == "never" else trainer.head.loss
    assert isinstance(module, uk.VPLLoss)
    options = {"base", "mix", "max_age", "start_iteration"}
    assert options < recipe["class_options"].keys()
    for option in options:
        assert getattr(module, option) == recipe["class_options"][option]
    assert (module.scale, module.head.m2) == (64.0, 0.5)


@pytest.mark.parametrize("enabled", [pytest.param("never", marks=pytest.mark.extended), "always"])
def test_the_features_of_the_averaged_weights_are_stored(
    faces: Path, tmp_path: Path, enabled: str
) -> None:
    """Nothing is mixed in the first steps: the losses are the same, the memories are not."""
    found = []
    for on in (True, False):
        folder = tmp_path / str(on)
        trainer = train(_momentum(faces, folder, on, enabled=enabled))
        module = trainer.loss.class_loss if enabled == "never" else trainer.head.loss
        found.append((losses(folder), module.stamps, module.features))
    (with_average, stamps, features), (without, others, plain) = found
    assert with_average == without
    assert torch.equal(stamps, others)
    assert int((features != plain).any(dim=1).sum()) == int((stamps > 0).sum()) > 0


@pytest.mark.extended
def test_a_run_with_averaged_features_resumes_bitwise(faces: Path, tmp_path: Path) -> None:
    options = {"partial_fc": {"sample_rate": 0.5}}
    configs = [_momentum(faces, tmp_path / n, **options["partial_fc"]) for n in ("whole", "cut")]
    for config in configs:
        config.loss.class_options = {"start_iteration": 0}
    whole = train(configs[0])
    train(configs[1], stop_after=2)
    resumed = trainer_of(configs[1])
    path = checkpoint.last(tmp_path / "cut")
    resumed.load_state(checkpoint.read_run(path), path)
    resumed.fit(tmp_path / "cut")
    assert_same_state(dict(resumed.head.state_dict()), dict(whole.head.state_dict()))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"class": "arcface"}, "needs a loss.class that stores features: vpl"),
        ({"class": "vpl"}, "needs train.ema, e.g. train.ema=0.999"),
    ],
)
def test_contradictions(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(("test", {"loss": {**loss, "class_momentum": True}}))
