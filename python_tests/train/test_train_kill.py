"""Runs that are killed and resumed: the results equal those of an uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import forkserver
from support.training import IRESNET, ROOT, arguments, assert_same_state, tiny, write_faces

from train import checkpoint
from train.main import main
from train.run_folder import CONFIG, EVALUATIONS, METRICS, TABLE, read_metrics

MAIN = str(ROOT / "train" / "main.py")
SAVE_STEPS = 2
STEPS = 24
KILLS = 10
BATCH = 10


def _process(argv: list[str], output: str) -> None:
    """As ``python train/main.py``, without the seconds that its imports take."""
    torch.set_num_threads(1)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(argv))


def start(argv: list[str], output: Path) -> Any:
    process = forkserver().Process(target=_process, args=(argv, str(output)))
    process.start()
    return process


def steps_logged(run: Path) -> int:
    """The last step with a complete line; 0 without any."""
    path = run / METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def prepared(run: Path) -> int:
    """Changes when a process has dropped the lines of steps after its checkpoint."""
    try:
        return (run / CONFIG).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def step_saved(run: Path) -> int:
    path = run / checkpoint.LAST
    return int(checkpoint.read_run(path)["trainer"]["step"]) if path.exists() else 0


def without_speed(run: Path) -> list[dict[str, Any]]:
    return [
        {k: value for k, value in line.items() if k != "images_per_s" and not k.endswith("_ms")}
        for line in read_metrics(run)
    ]


def assert_same_run(run: Path, whole: Path) -> None:
    for name in ("last.pt", "best.pt"):
        ours, theirs = (
            checkpoint.read_run(folder / checkpoint.LAST.parent / name) for folder in (run, whole)
        )
        for values in (ours, theirs):
            values["config"]["run"]["dir"] = ""
        assert_same_state(ours, theirs)
    assert without_speed(run) == without_speed(whole)
    assert (run / EVALUATIONS).read_text() == (whole / EVALUATIONS).read_text()
    assert (run / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
    rows = [line.split(",") for line in (run / TABLE).read_text().splitlines()]
    assert [float(row[2]) for row in rows[1:]] == [line["loss"] for line in read_metrics(run)]
    # No unfinished checkpoint is left.
    names = {p.name for p in (run / checkpoint.LAST.parent).iterdir()}
    assert names == {p.name for p in (whole / checkpoint.LAST.parent).iterdir()}


@pytest.mark.extended
def test_killed_ten_times_at_any_moment_it_ends_like_a_run_left_alone(tmp_path: Path) -> None:
    """Real faces, and everything that has a state: momentum, EMA, memory, dropout, the best."""

    def argv(run: str) -> list[str]:
        config = tiny(
            Path("orl"),
            tmp_path / run,
            # Steps that take longer than a signal.
            model=IRESNET | {"dropout": 0.1},
            data={"shift": 0.1, "brightness": 0.2, "holdout": 4},
            loss={"memory": True},
            train={"epochs": 2, "batch_size": BATCH, "max_steps": STEPS, "ema": 0.9},
            eval={"every": 6, "best": "auc"},
            run={"save_steps": SAVE_STEPS, "keep": 2},
        )
        return arguments(config)

    run, whole = tmp_path / "run", tmp_path / "whole"
    alone = start(argv("whole"), tmp_path / "output")
    alone.join(timeout=120)
    assert alone.exitcode == 0, (tmp_path / "output").read_text()
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))

    # A kill comes within a step and a half of a line, however fast the machine.
    longest = 1.5 * statistics.median(BATCH / line["images_per_s"] for line in lines)
    chance = random.Random(0)
    saved = 0
    for _ in range(KILLS):
        before = prepared(run)
        process = start([*argv("run"), "--resume", "auto"], tmp_path / "output")
        # The last kills must find a run to kill, however far the earlier ones let it go.
        goal = min(saved + chance.choice((0, 1, 2)), STEPS - 3)
        deadline = time.monotonic() + 60
        while prepared(run) == before or steps_logged(run) < goal:
            if not process.is_alive() or time.monotonic() > deadline:
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0, longest))  # in a step, an evaluation or a checkpoint
        process.kill()
        process.join(timeout=30)
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "output").read_text()
        logged = steps_logged(run)
        saved = step_saved(run)
        assert logged >= goal
        assert logged - saved <= SAVE_STEPS

    last = start([*argv("run"), "--resume", "auto"], tmp_path / "output")
    last.join(timeout=120)
    assert last.exitcode == 0, (tmp_path / "output").read_text()
    assert_same_run(run, whole)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=8, images=4)


@pytest.mark.extended
def test_a_killed_script_goes_on_by_the_same_command(faces: Path, tmp_path: Path) -> None:
    """The true thing, once: SIGTERM to a script and the process that decodes for it, as schedulers
    send it; another takes its run to the end.
    """
    sections: dict[str, dict[str, Any]] = {
        "model": IRESNET,
        "data": {"holdout": 4, "cache": "never", "workers": 1},
        "train": {"epochs": 8},
        "eval": {"every": 5},
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(arguments(tiny(faces, whole, **sections))) == 0
    command = [sys.executable, MAIN, *arguments(tiny(faces, run, **sections)), "--resume", "auto"]
    script = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while steps_logged(run) < 3 and script.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(script.pid, signal.SIGTERM)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 0, errors
    stopped = step_saved(run)
    assert 3 <= stopped < 16
    assert errors.strip() == f"stopped at step {stopped} of 16; continue with --resume"
    assert not (run / "evaluation.json").exists()
    assert main(command[2:]) == 0
    assert_same_run(run, whole)
    # And once more: there is nothing left to do.
    assert main(command[2:]) == 0
    assert_same_run(run, whole)
