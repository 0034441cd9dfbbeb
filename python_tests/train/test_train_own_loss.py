"""Policies of the user's own in training, and names in checkpoints, which import nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import arguments, assert_same_state, losses, tiny, train, write_faces

import unitsface_kernels as uk
from train import checkpoint
from train.config import make_config
from train.errors import UserError
from train.evaluate import run as evaluate
from train.evaluation.model import load_model
from train.losses import build_loss, first_threshold
from train.main import main
from train.meter import scale_of
from train.run_folder import read_metrics
from unitsface_kernels import policy

OWN = """
from pathlib import Path
from unitsface_kernels import policy

Path(__file__).with_suffix(".imported").touch()

class Pairs(policy.Pair):
    combine = "softplus"
    scale: policy.Number = policy.number(16.0, above=0.0)
    b: policy.Threshold

    def positive(self, c):
        return self.scale * c - self.b

    def negative(self, c):
        return self.scale * c - self.b

class Classes(policy.Class):
    combine = "logsumexp"
    margin: policy.Number = 0.2
    kind: policy.Number = policy.number("cosine", choices=("cosine", "none"))

    def positive(self, c):
        return 16 * (c - self.margin)

    def negative(self, c):
        return 16 * c

class Rows(policy.Pair):
    easy: policy.PerRow

    def negative(self, c):
        return c * self.easy

something = 3
"""


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a module ``own_losses`` that notes its import."""
    sys.modules.pop("own_losses", None)
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("own_losses", None)


def imported(here: Path) -> bool:
    return (here / "own_losses.imported").exists()


def run(faces: Path, here: Path, *more: str, steps: int = 4) -> int:
    config = tiny(faces, here / "run", train={"max_steps": steps}, loss=BACKEND)
    return main([*arguments(config), "run.overwrite=true", *more])


BACKEND = {"backend": "reference"}
OWN_BOTH = ("loss.class=own_losses:Classes", "loss.pair=own_losses:Pairs")


def test_trains_and_resumes_bit_for_bit(faces: Path, here: Path) -> None:
    options = {"margin": 0.1, "kind": "none"}
    loss = {**BACKEND, "class": "own_losses:Classes", "class_options": options}
    loss |= {"pair": "own_losses:Pairs", "pair_options": {"init_threshold": 5.0}}
    found = []
    for name, stop_after in (("whole", None), ("cut", 3)):
        train(tiny(faces, here / name, loss=loss), stop_after=stop_after)
        if stop_after:
            # Options are the checkpoint's; only the names are given again.
            assert main(["--resume", f"run.dir={here / name}", *OWN_BOTH]) == 0
        found.append(checkpoint.read_run(here / name / "checkpoints/last.pt"))
    for part in ("backbone", "loss", "optimizer", "trainer"):
        assert_same_state(found[1][part], found[0][part])
    assert losses(here / "whole") == losses(here / "cut")
    line, state = read_metrics(here / "whole")[-1], found[0]["loss"]
    assert math.isfinite(line["loss"])
    assert line["class_loss"] > 0
    assert line["pair_loss"] > 0
    assert float(state["pair_loss.threshold"]) not in (0.0, 5.0)
    assert found[0]["config"]["loss"]["class"] == "own_losses:Classes"


def test_numbers_are_options_of_the_policy(here: Path) -> None:
    layer = {"class": "own_losses:Classes", "class_options": {"margin": 0.7, "init_std": 0.5}}
    config = make_config(("test", {"loss": {**layer, "pair": "own_losses:Pairs"}}))
    assert not imported(here)  # only now is a loss built
    loss = build_loss(config.loss, 7, 5)
    assert isinstance(loss.class_loss, uk.ClassLoss)
    assert isinstance(loss.pair_loss, uk.PairLoss)
    assert loss.class_loss.policy.values() == {"margin": 0.7, "kind": "cosine"}
    assert loss.class_loss.weight.shape == (7, 5)
    assert loss.class_loss.init_std == 0.5


def test_a_scale_per_identity_is_not_that_of_a_threshold() -> None:
    class Scaled(policy.Pair):
        combine = "softplus"
        scale: policy.PerIdentity = 3.0
        b: policy.Threshold

        def positive(self, c):
            return self.scale * c - self.b

        def negative(self, c):
            return self.scale * c - self.b

    loss = uk.PairLoss(Scaled(), num_identities=4, init_threshold=2.0)
    assert first_threshold(loss) is None
    assert scale_of(loss, uk.USSLoss(scale=32.0)) == "32 (USSLoss)"


def test_the_recipe_names_an_example(faces: Path, here: Path) -> None:
    recipe = Path(checkpoint.__file__).parent / "configs/loss/own_contrastive.yaml"
    config = tiny(faces, here / "run", train={"max_steps": 1})
    keys = [a for a in arguments(config) if not a.startswith("loss.")]
    keys.append("loss.backend=reference")
    assert main(["--config", str(recipe), *keys]) == 0
    assert read_metrics(here / "run")[0]["pair_loss"] > 0


# -- names that are not the user's ----------------------------------------------------------------


@pytest.fixture
def hostile(faces: Path, here: Path) -> Path:
    """A checkpoint whose configuration names code that would be found."""
    train(tiny(faces, here / "run", train={"max_steps": 2}, loss={"pair": "none"}))
    path = here / "run/checkpoints/last.pt"
    values = torch.load(path, weights_only=True)
    values["config"]["loss"].update({"class": "own_losses:Classes", "class_options": {}})
    torch.save(values, path)
    return path


def _resume(path: Path) -> int:
    return main(["--resume", str(path), "train.max_steps=3"])


READERS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "resume": (_resume, 2),
    "resume auto": (lambda p: main(["--resume", "auto", f"run.dir={p.parents[1]}"]), 2),
    "evaluate": (lambda p: evaluate(["thresholds", str(p), "data.workers=0"]), 0),
    "load": (lambda p: load_model(p).config.loss.class_name, "own_losses:Classes"),
    "weights": (
        lambda p: main(
            [
                *(f"model.weights={p}", f"run.dir={p.parents[2] / 'other'}", "train.max_steps=1"),
                *("model.name=conv4", "model.input_size=16", "train.batch_size=8"),
                *(
                    f"data.path={load_model(p).config.data.path}",
                    "data.workers=0",
                    "run.report=false",
                ),
            ]
        ),
        0,
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_name_in_a_checkpoint_imports_nothing(
    here: Path, hostile: Path, reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Even where the module could be found.
    sys.path.append(str(here))
    read, expected = READERS[reader]
    found = read(hostile)
    assert not imported(here)
    assert "own_losses" not in sys.modules
    if expected is not None:
        assert found == expected
    if reader.startswith("resume"):
        message = capsys.readouterr().err
        assert "loss.class=own_losses:Classes is code that a checkpoint names" in message


def test_the_user_s_own_configuration_naming_it_too_is_enough(
    faces: Path, here: Path, tmp_path: Path
) -> None:
    assert run(faces, here, *OWN_BOTH, steps=1) == 0
    file = tmp_path / "mine.yaml"
    file.write_text("loss: {class: 'own_losses:Classes', pair: 'own_losses:Pairs'}\n")
    given = ["--resume", f"run.dir={here / 'run'}", "train.max_steps=2"]
    assert main([*given, OWN_BOTH[0]]) == 2  # the other one is the checkpoint's alone
    assert main([*given, "--config", str(file)]) == 0


def test_a_changed_name_is_another_loss(
    faces: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(faces, here, *OWN_BOTH, steps=1) == 0
    given = ["--resume", f"run.dir={here / 'run'}", OWN_BOTH[1]]
    assert main([*given, "loss.class=cosface"]) == 2
    assert "leave loss.class as it was" in capsys.readouterr().err


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "../evil:Evil", "evil:", ":Evil", "a b:C", "a:b:c", "a.:C", ".a:C"),
        *("a:C()", "a-b:C", "/tmp/evil.py:C", "a;b:C", "a\n:C", "évil:C", "__import__('os'):C"),
    ],
)
def test_what_is_no_name_of_a_class_is_refused_unread(name: str) -> None:
    with pytest.raises(UserError, match=r"loss.class: expected one of .*, or package.module:Class"):
        make_config(("test", {"loss": {"class": name}}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["loss.pair=own_losses:Classes"],
            "derived from unitsface_kernels.policy.Pair, got <class",
        ),
        (["loss.pair=own_losses:something"], "expected a policy, .* got 3"),
        (["loss.pair=own_losses:Missing"], "expected a policy, .* got nothing of that name"),
        (["loss.pair=no_such_module:Pairs"], "cannot import no_such_module: No module named"),
        (["loss.pair=broken:Pairs"], "cannot import broken: FormulaError: .*broken.py:5"),
        (["loss.pair=raises:Pairs"], "cannot import raises: ZeroDivisionError: division by zero"),
        (
            ["loss.pair=own_losses:Pairs", "loss.pair_options.margin=1"],
            "loss.pair_options.margin: own_losses:Pairs takes scale, thresholds, init_threshold",
        ),
        (["loss.pair=own_losses:Pairs", "loss.pair_options.scale=-1"], "scale must be > 0, got -1"),
        (["loss.pair=own_losses:Pairs", "loss.pair_options.thresholds=two"], "thresholds must be"),
        (["loss.class=own_losses:Classes", "loss.class_options.kind=x"], "kind must be one of"),
        (["loss.pair=own_losses:Rows"], "own_losses:Rows: training has no values of easy, which"),
    ],
)
def test_mistakes_are_one_line(
    faces: Path, here: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    import re

    (here / "broken.py").write_text(
        "from unitsface_kernels import policy\n\nclass Pairs(policy.Pair):\n"
        "    def positive(self, c):\n        return 1 if c else 2\n"
    )
    (here / "raises.py").write_text("1 / 0\n")
    assert run(faces, here, *given, steps=1) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (here / "run").exists()
