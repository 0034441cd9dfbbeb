"""Several processes that stop together, evaluate together, and see what one of them saw."""

from __future__ import annotations

import functools
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import IRESNET, ROOT, assert_same_state, losses, write_faces
from test_train_partial_fc import (
    SAVED_ONCE,
    argv_of,
    assert_close_state,
    die_in_step,
    start,
    start_agent,
    state,
    succeed,
)

from train import checkpoint
from train.backbones import Conv4
from train.errors import USER_ERROR
from train.run_folder import METRICS


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 people to train on, 2 steps of 10 images; 15 images of 3 others."""
    return write_faces(tmp_path_factory.mktemp("faces"), identities=7, images=5)


def argv(faces: Path, run: Path, /, **sections: dict[str, Any]) -> list[str]:
    values: dict[str, dict[str, Any]] = {
        "model": {"freeze_bn": False, "dropout": 0.1},
        "data": {"holdout": 3},
        "partial_fc": {"enabled": "auto"},
        "train": {"epochs": 4, "batch_size": 10, "lr": 0.01, "timeout_s": 20.0},
    }
    for section, entries in sections.items():
        values.setdefault(section, {}).update(entries)
    return argv_of(faces, run, **values)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.extended
def test_a_signal_to_one_process_stops_all_at_a_step_and_the_run_goes_on(
    faces: Path, tmp_path: Path
) -> None:
    # Three: sums of two do not depend on the order, in which a resumed run must take them, too.
    whole, plain, run = (tmp_path / name for name in ("whole", "plain", "run"))
    evaluated = {"eval": {"every": 3}, "run": {"keep": 2}, "train": {"ema": 0.5}}
    succeed(tmp_path, 3, argv(faces, whole, **evaluated))
    assert [line["step"] for line in evaluations(whole)] == [3, 6, 8]
    names = {path.name for path in (whole / "checkpoints").iterdir()}
    assert names == {"last", "best", "step-000006", "step-000008"}

    # Evaluation by all changes nothing for any.
    succeed(tmp_path, 3, argv(faces, plain, run=SAVED_ONCE, train={"ema": 0.5}))
    assert losses(plain) == losses(whole)
    ours, theirs = state(plain), state(whole)
    for values in (ours, theirs):
        values.pop("trainer")
    assert_same_state(ours, theirs)

    sigterm = functools.partial(die_in_step, number=signal.SIGTERM)
    found = start(tmp_path, 3, argv(faces, run, **evaluated), change=sigterm)
    assert [code for code, _ in found] == [0, 0, 0], found
    step = len(losses(run))
    assert step in (6, 7)  # requested in the 6th, agreed on one later
    said = f"stopped at step {step} of 8; continue with --resume"
    assert [output.count(said) for _, output in found] == [1, 0, 0]
    succeed(tmp_path, 3, ["--resume", "auto", f"run.dir={run}"])
    assert losses(run) == losses(whole)
    assert_same_state(state(run), state(whole))
    assert evaluations(run) == evaluations(whole)


def spoil_features(rank: int) -> None:
    """The second process's features are infinite in the 4th step."""
    forward, calls = Conv4.forward, [0]

    def spoiled(self: Conv4, x: torch.Tensor) -> torch.Tensor:
        calls[0] += self.training
        return forward(self, x) * (math.inf if rank == 1 and calls[0] == 4 else 1.0)

    Conv4.forward = spoiled  # type: ignore[method-assign]


@pytest.mark.extended
def test_the_process_that_saw_the_first_bad_loss_is_named(faces: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    alone = {"loss": {"pair_across_ranks": False}, "partial_fc": {"enabled": "never"}}
    given = argv(faces, run, run={"log_every": 10, "save_every": 3, "save_steps": 2}, **alone)
    # Its pairs are its own, and the statistics of the first one are still good.
    for code, output in start(tmp_path, 2, given, change=spoil_features):
        assert code == USER_ERROR, output
        line = output.splitlines()[-1]
        assert "the loss is nan at step 4; try a smaller train.lr" in line
        assert "first on process 1: " in line
        assert "largest feature norm inf" in line
        assert "the last checkpoint, of step 2, is kept" in line
    assert checkpoint.read_run(run / checkpoint.LAST)["trainer"]["step"] == 2


@pytest.mark.extended
def test_parts_of_a_batch_are_averaged_once(faces: Path, tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {
        "model": {"freeze_bn": True, "dropout": 0.0},
        "loss": {"pair": "none"},
        "partial_fc": {"enabled": "never"},
    }
    for parts in (1, 2):
        sections["train"] = {"accumulate": parts, "epochs": 2, "lr": 0.002}
        succeed(tmp_path, 2, argv(faces, tmp_path / f"parts{parts}", **sections))
    one, two = (tmp_path / f"parts{parts}" for parts in (1, 2))
    assert losses(one) == pytest.approx(losses(two), rel=1e-5)
    ours, theirs = (checkpoint.read_run(run / checkpoint.LAST) for run in (one, two))
    for part in ("backbone", "loss", "optimizer"):
        assert_close_state(ours[part], theirs[part], part)


@pytest.mark.extended
def test_torchrun_passes_a_signal_on_and_all_is_saved(faces: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Steps that take longer than a signal.
    given = argv(faces, run, model=IRESNET, train={"epochs": 500})
    script = str(ROOT / "train" / "main.py")
    said = tmp_path / "output"
    agent = start_agent(said, script, given, "--standalone", "--nproc_per_node=2")
    deadline = time.monotonic() + 90
    path = run / METRICS
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert agent.is_alive(), said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    agent.terminate()  # by SIGTERM
    agent.join(timeout=60)
    step = len(losses(run))
    assert f"stopped at step {step} of 1000; continue with --resume" in said.read_text()
    assert step < 1000
    values = checkpoint.read_run(checkpoint.last(run))
    assert values["trainer"]["step"] == step
    assert state(run)["trainer"]["step"] == step
