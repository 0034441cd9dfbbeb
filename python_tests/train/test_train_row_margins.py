"""Losses with margins per row and per class by name, from their recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from support.training import assert_same_state, tiny, train, trainer_of, write_faces

import unitsface_kernels as uk
from train import checkpoint
from train import losses as train_losses

RECIPES = Path(train_losses.__file__).parent / "configs/loss"
NAMES = ("adaface", "class_margin", "elasticface", "magface")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Identities of which the first has fewer images."""
    folder = write_faces(tmp_path_factory.mktemp("faces"), identities=4, images=5)
    for image in sorted((folder / "person1").iterdir())[1:]:
        image.unlink()
    return folder


@pytest.mark.parametrize("enabled", ["never", "always"])
def test_recipes_build_their_losses(faces: Path, tmp_path: Path, enabled: str) -> None:
    for name in NAMES:
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["loss"]
        config = tiny(faces, tmp_path, loss=recipe, partial_fc={"enabled": enabled})
        trainer = trainer_of(config)
        module = trainer.loss.class_loss if enabled == "never" else trainer.head.loss
        assert isinstance(module, uk.CLASS_LOSSES[name])
        for option, value in recipe["class_options"].items():
            found = {**vars(module), **module.values()}.get(option, value)
            if not isinstance(found, torch.Tensor):
                assert found == value, f"{name}: {option}"
        if name == "class_margin":
            # One image, five of all others.
            want = torch.tensor([0.5, *[0.5 * 5**-0.25] * 3])
            torch.testing.assert_close(module.margin, want)


@pytest.mark.extended
@pytest.mark.parametrize("name", NAMES)
def test_runs_resume_with_statistics_and_draws(faces: Path, tmp_path: Path, name: str) -> None:
    options = {"loss": {"class": name, "pair": "none"}, "train": {"max_steps": 3}}
    whole = train(tiny(faces, tmp_path / "whole", **options))
    train(tiny(faces, tmp_path / "cut", **options), stop_after=2)
    resumed = trainer_of(tiny(faces, tmp_path / "cut", **options))
    path = checkpoint.last(tmp_path / "cut")
    resumed.load_state(checkpoint.read_run(path), path)
    resumed.fit(tmp_path / "cut")
    assert_same_state(dict(resumed.state()["loss"]), dict(whole.state()["loss"]))
