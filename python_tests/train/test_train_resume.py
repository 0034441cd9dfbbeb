"""Settings that a resumed run takes from its checkpoint or from the command line."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import CPU, arguments, assert_same_state, tiny, train, trainer_of, write_faces

from train import checkpoint
from train.data.identities import check_names, pack_names
from train.data.image_list import whole
from train.data.records import Encoded
from train.errors import UserError
from train.evaluation.during import Evaluator
from train.main import main
from train.meter import Meter
from train.run_folder import MetricsLog, prepare, read_metrics


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=6, images=4)


def resumed(run: Path, config: Any) -> Any:
    """A trainer of this configuration with the state of a run's last checkpoint."""
    trainer = trainer_of(config)
    path = checkpoint.last(run)
    trainer.load_state(checkpoint.read_run(path), path)
    return trainer


@pytest.mark.parametrize("enabled", ["never", "always"])
def test_options_of_the_optimizer_are_those_asked_for_now(
    faces: Path, tmp_path: Path, enabled: str
) -> None:
    partial = {"enabled": enabled}
    train(tiny(faces, tmp_path, train={"max_steps": 1}, partial_fc=partial))
    options = {"weight_decay": 0.125, "momentum": 0.5, "threshold_lr": 3.0}
    trainer = resumed(tmp_path, tiny(faces, tmp_path, train=options, partial_fc=partial))
    weights, thresholds = trainer.optimizer.param_groups
    assert (weights["weight_decay"], weights["momentum"]) == (0.125, 0.5)
    assert (thresholds["weight_decay"], thresholds["lr_scale"]) == (0.0, 3.0)
    assert len(trainer.optimizer.state) > 0  # its momentum is still the checkpoint's


def test_another_optimizer_is_refused_in_one_line(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(faces, tmp_path, train={"max_steps": 1}))
    given = ["--resume", f"run.dir={tmp_path}"]
    assert main([*given, "train.optimizer=adamw"]) == 2
    assert "holds the state of sgd; leave train.optimizer as it was" in capsys.readouterr().err
    # Neither had the run a scale of its gradients, nor is one needed from it.
    assert main([*given, "train.amp=fp16", "train.max_steps=2"]) == 0


def test_an_average_that_begins_late_begins_with_the_weights(faces: Path, tmp_path: Path) -> None:
    train(tiny(faces, tmp_path, train={"max_steps": 1}))
    trainer = resumed(tmp_path, tiny(faces, tmp_path, train={"max_steps": 1, "ema": 0.5}))
    assert trainer.evaluated is not trainer.backbone
    assert_same_state(trainer.evaluated.state_dict(), trainer.backbone.state_dict())


def test_other_people_are_named_and_earlier_checkpoints_still_known(tmp_path: Path) -> None:
    path, names = tmp_path / "last.pt", ["anna", "bert", "carla"]
    for held in (pack_names(names), names):
        check_names(held, names, path)
        with pytest.raises(UserError, match=r"number 1 the names are 'bert' and 'bruno'"):
            check_names(held, ["anna", "bruno", "carla"], path)
        with pytest.raises(UserError, match=r"\(3\).*\(4\); of number 3 .* none and 'dora'"):
            check_names(held, [*names, "dora"], path)


def test_figures_of_an_end_that_is_yet_to_come_are_not_kept(faces: Path, tmp_path: Path) -> None:
    config = tiny(faces, tmp_path, data={"holdout": 2}, train={"max_steps": 1})
    assert main(arguments(config)) == 0
    assert (tmp_path / "evaluation.json").exists()
    prepare(tmp_path, config, resume_step=1)
    assert not (tmp_path / "evaluation.json").exists()
    assert not (tmp_path / "features.npz").exists()
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"a", b"\x80\x02", b"\x80\x02h\x05.", b"(lp0\n0a.", b""])
def test_any_file_that_is_no_checkpoint_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read checkpoint .*x\.pt"):
        checkpoint.read(tmp_path / "x.pt")


def test_a_full_disk_is_one_line(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsLog, "write", full)
    assert main(arguments(tiny(faces, tmp_path))) == 2
    assert capsys.readouterr().err == "error: cannot write: No space left on device\n"


def test_evaluations_that_cannot_be_are_refused_before_the_first_step(
    faces: Path, tmp_path: Path
) -> None:
    empty = whole(Encoded([], ""), [], [])
    with pytest.raises(UserError, match=r"eval\.every=5: nothing to evaluate"):
        Evaluator(tiny(faces, tmp_path, eval={"every": 5}), CPU, empty)
    people = trainer_of(tiny(faces, tmp_path)).source.images
    wrong = tiny(faces, tmp_path, eval={"every": 5, "best": "charm"})
    with pytest.raises(UserError, match=r"eval\.best: expected one of accuracy, .* got 'charm'"):
        Evaluator(wrong, CPU, people)
    evaluator = Evaluator(tiny(faces, tmp_path, eval={"every": 5}), CPU, people)
    assert evaluator.value({"held_out": {"accuracy": float("nan")}}) is None
    # Every declared figure exists.
    (held_out,) = evaluator.sets
    features = np.eye(len(people), 8, dtype=np.float32) + 0.1
    assert set(held_out.metrics) <= set(held_out.score(features, threshold=0.5))


def test_speed_is_that_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(CPU)
    meter.add(torch.zeros(4), 8)
    now[0] = 2.0
    assert meter.take().images_per_s == 4.0
    now[0] = 100.0  # an evaluation
    meter.restart_clock()
    meter.add(torch.zeros(4), 8)
    now[0] = 104.0
    assert meter.take().images_per_s == 2.0


def test_the_clock_stops_for_evaluations_and_checkpoints(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for cls, name in ((Meter, "take"), (Meter, "restart_clock"), (Evaluator, "evaluate")):
        method = getattr(cls, name)

        def noted(*given: Any, method: Any = method, name: str = name, **named: Any) -> Any:
            calls.append(name)
            return method(*given, **named)

        monkeypatch.setattr(cls, name, noted)
    config = tiny(faces, tmp_path, eval={"every": 2}, data={"holdout": 2}, train={"epochs": 1})
    assert main(arguments(config)) == 0
    assert calls == ["restart_clock", "take", "take", "evaluate", "restart_clock"]
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]
