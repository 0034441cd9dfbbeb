"""Metrics in TensorBoard and Weights & Biases; nothing here reaches a network."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.training import arguments, tiny, train, write_faces
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import trainer as trainer_module
from train.data.dataset import open_dataset
from train.distributed import DistributedEnv
from train.errors import UserError
from train.main import main
from train.run_folder import MetricsLog, prepare, read_metrics
from train.trackers import numbers, open_trackers
from train.trainer import Trainer

SMALL: dict[str, Any] = {"model": {"name": "conv4"}, "train": {"epochs": 2}}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=2, images=4)


class FakeRun:
    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given, self.defined, self.finished = given, {}, False
        self.logged: list[dict[str, float]] = []

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.defined[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        assert not self.finished
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A module in wandb's place; its runs."""
    runs: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        if given["project"] == "refused":
            raise RuntimeError("api_key not configured\nmore")
        runs.append(FakeRun(given))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None, origin="here")
    module.init, module.Settings = init, lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_a_project_gets_every_number_and_a_resumed_run_goes_on_with_it(
    faces: Path, tmp_path: Path, wandb: list[FakeRun]
) -> None:
    config = tiny(faces, tmp_path / "mine", **SMALL, run={"wandb": "faces"})
    train(config, stop_after=1)
    assert main([*arguments(config), "--resume"]) == 0
    first, second = wandb
    assert first.given["project"] == "faces"
    assert first.given["name"] == "mine"
    assert first.given["id"] == second.given["id"]
    assert first.given["resume"] == "allow"
    assert first.given["config"]["train"]["batch_size"] == 8
    assert first.defined == {"*": "step"}
    assert all(run.finished for run in wandb)
    logged = [values for run in wandb for values in run.logged if "train/loss" in values]
    assert [v["step"] for v in logged] == [1, 2]
    assert [v["train/loss"] for v in logged] == [v["loss"] for v in read_metrics(tmp_path / "mine")]
    # Another run in its place is a run of its own.
    assert main([*arguments(config), "run.overwrite=true", "train.epochs=1"]) == 0
    assert wandb[2].given["id"] != first.given["id"]
    assert (tmp_path / "mine.old-1" / "wandb" / "run_id").exists()


def test_what_is_missing_is_named_with_its_remedy_before_anything_is_written(
    faces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # wandb leaves folders of its own name, which are not the package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    config = tiny(faces, tmp_path / "run", run={"wandb": "faces"})
    assert main(arguments(config)) == 2
    assert "run.wandb: the package wandb is not installed; pip install wandb" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    assert main(arguments(tiny(faces, tmp_path / "run", run={"tensorboard": True}))) == 2
    said = capsys.readouterr().err
    assert "pip install tensorboard, or run.tensorboard=false" in said
    assert not (tmp_path / "run").exists()


def test_what_wandb_refuses_is_one_line(
    faces: Path, tmp_path: Path, wandb: list[FakeRun], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(faces, tmp_path / "run", **SMALL, run={"wandb": "refused"})
    assert main(arguments(config)) == 2
    assert capsys.readouterr().err == "error: run.wandb=refused: api_key not configured more\n"


def _refused(rank: int, faces: Path, run: Path) -> list[str]:
    def refuse(*_: object) -> None:
        raise UserError(f"refused on process {rank}")

    trainer_module.open_trackers = refuse
    config = tiny(faces, run, **SMALL)
    world = DistributedEnv(rank, 2, torch.device("cpu"))
    trainer = Trainer(config, world, open_dataset(config).train)
    if rank == 0:
        prepare(run, config, resume_step=None)
    try:
        trainer.fit(run)
    except UserError as error:
        return [str(error)]
    return []


@pytest.mark.extended
def test_a_tracker_that_is_refused_ends_all_processes(faces: Path, tmp_path: Path) -> None:
    found = run_ranks(2, _refused, faces, tmp_path / "run", timeout=60.0)
    assert found == [["refused on process 0"]] * 2


def test_wandb_is_not_imported_unless_asked_for(faces: Path, tmp_path: Path) -> None:
    assert open_trackers(tiny(faces, tmp_path), tmp_path, 1) == []
    assert "wandb" not in sys.modules or importlib.util.find_spec("wandb") is not None


def test_numbers_that_are_learned_reach_tensorboard(faces: Path, tmp_path: Path) -> None:
    config = tiny(faces, tmp_path, run={"tensorboard": True})
    log = MetricsLog(tmp_path, open_trackers(config, tmp_path, 1))
    log.write({"step": 1, "loss": 0.5, "pair_loss": None, "learned": {"class.scale": 64.0}})
    log.write_evaluation(1, 0.1, {"lfw": {"accuracy": 0.75}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/learned/class.scale",
        "eval/lfw/accuracy",
    }
    assert events.Scalars("eval/lfw/accuracy")[0].value == 0.75
    assert dict(numbers({"step": 3, "a": {"b": 1.0}, "c": None}, "x")) == {"x/a/b": 1.0}


@pytest.mark.extended
def test_the_package_itself_writes_offline(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tiny(faces, tmp_path / "run", **SMALL, run={"wandb": "faces"}))
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    end = time.monotonic() + 30  # wandb's own process writes the last block after the run is over
    while b"train/loss" not in (content := written.read_bytes()) and time.monotonic() < end:
        time.sleep(0.1)
    own = (tmp_path / "run" / "wandb" / "run_id").read_text()
    assert own in written.name
    for name in (b"train/loss", b"train/images_per_s", json.dumps("conv4").encode()):
        assert name in content, name
