"""Numbers of losses that training learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.training import (
    arguments,
    assert_same_state,
    read_metrics,
    tiny,
    train,
    write_faces,
)

import unitsface_kernels as uk
from train import checkpoint
from train.__main__ import main
from train.config import make_config
from train.config.sections import LossConfig
from train.errors import UserError
from train.losses import build_loss, first_threshold, learned_numbers
from train.meter import scale_of
from train.optimizer import build_optimizer
from unitsface_kernels import dispatch

LEARNED = {
    "class_options": {"scale": 16},
    "class_learned": ["scale", "margin"],
    "pair_learned": ["scale"],
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


@pytest.mark.extended
def test_trains_and_resumes_bit_for_bit(faces: Path, tmp_path: Path) -> None:
    loss = {"backend": "reference", **LEARNED}
    found = []
    for name, stop_after in (("whole", None), ("cut", 3)):
        train(tiny(faces, tmp_path / name, loss=loss), stop_after=stop_after)
        if stop_after:
            assert main(["--resume", f"run.dir={tmp_path / name}"]) == 0
        found.append(checkpoint.read_run(tmp_path / name / "checkpoints/last.pt"))
    for part in ("loss", "optimizer"):
        assert_same_state(found[1][part], found[0][part])
    state, line = found[0]["loss"], read_metrics(tmp_path / "whole")[-1]
    assert line["learned"] == {
        "class.scale": pytest.approx(float(state["class_loss.scale"])),
        "class.m3": pytest.approx(float(state["class_loss.m3"])),
        "pair.scale": pytest.approx(float(state["pair_loss.scale"])),
    }
    assert line["learned"]["class.scale"] != 16.0


def test_a_step_of_classes_in_shards(faces: Path, tmp_path: Path) -> None:
    if dispatch.unavailable("native", "cpu", torch.float32) is not None:
        pytest.skip("needs the native backend")
    config = tiny(
        faces,
        tmp_path / "run",
        loss={"backend": "native", "pair": "none", **LEARNED},
        partial_fc={"enabled": "always"},
        train={"max_steps": 2},
    )
    train(config)
    learned = read_metrics(tmp_path / "run")[-1]["learned"]
    assert learned.keys() == {"class.scale", "class.m3"}
    assert learned["class.scale"] != 16.0


def test_numbers_are_parameters_without_weight_decay() -> None:
    config = make_config(("test", {"loss": {"class": "cosface", **LEARNED}}))
    loss = build_loss(config.loss, 7, 5)
    assert isinstance(loss.class_loss, uk.CosFaceLoss)
    assert loss.class_loss.scale.item() == 16.0
    assert loss.class_loss.m3.item() == pytest.approx(0.4)
    assert learned_numbers(loss, None).keys() == {"class.scale", "class.m3", "pair.scale"}
    assert scale_of(loss.class_loss) == "16 (CosFaceLoss)"
    backbone = torch.nn.Linear(5, 5)
    _, group = build_optimizer(config, backbone, loss).param_groups
    assert group["weight_decay"] == 0.0
    numbers = [loss.class_loss.scale, loss.class_loss.m3, loss.pair_loss.scale]
    assert {id(p) for p in numbers} <= {id(p) for p in group["params"]}
    uniface = LossConfig(class_name="uce", class_learned=["scale"], pair_name="none")
    assert first_threshold(build_loss(uniface, 7, 5)) == pytest.approx(4.2485 / 64, abs=1e-4)


def test_errors(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"loss.class_learned: cosface has the numbers scale, .*margin"
    ):
        build_loss(LossConfig(class_learned=["margni"]), 7, 5)
    own = LossConfig(
        class_name="none",
        pair_name="train.examples.policies:Contrastive",
        pair_learned=["scale"],
    )
    with pytest.raises(UserError, match=r"loss.pair_learned: .* has the numbers margin, got scale"):
        build_loss(own, 7, 5)
    config = tiny(faces, tmp_path / "run", loss={"backend": "reference", "pair": "none"})
    more = ("loss.class_learned=[scale]", "loss.class_options.scale=-1")
    assert main([*arguments(config), *more]) != 0
    assert "scale must be > 0, got -1.0" in capsys.readouterr().err
