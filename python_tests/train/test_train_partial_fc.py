"""Training with sharded classes: processes start, die, and go on in other numbers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import forkserver
from support.training import ROOT, arguments, assert_same_state, losses, tiny, write_faces
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.run import main as torchrun

from train import checkpoint
from train.config import make_config
from train.errors import LOST_PROCESS, USER_ERROR, UserError
from train.main import main
from unitsface_kernels import PartialFC

Change = Callable[[int], None]
# For runs that are read at their end only: a checkpoint takes as long as some steps.
SAVED_ONCE = {"save_every": 100}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _write_to(output: str) -> None:
    """From now on, also what processes of this one write."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _process(
    rank: int, size: int, port: int, output: str, argv: list[str], change: Change | None
) -> None:
    """As ``python train/main.py``, without the seconds that its imports take."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    _write_to(output)
    if change is not None:
        change(rank)
    sys.exit(main(argv))


def start(
    folder: Path,
    size: int,
    *argv: list[str],
    change: Change | None = None,
    patience: float = 10.0,
) -> list[tuple[int | None, str]]:
    """Exit codes and outputs of ``size`` processes; arguments for all or one list for each.

    ``patience`` is how many seconds after the first one the others may still run.
    """
    context = forkserver()
    port = free_port()
    outputs = [folder / f"output{rank}" for rank in range(size)]
    processes = [
        context.Process(
            target=_process,
            args=(rank, size, port, str(outputs[rank]), argv[rank % len(argv)], change),
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        processes[0].join(timeout=90)
        for process in processes[1:]:
            process.join(timeout=patience)
    finally:
        for process in processes:
            process.kill()
    return [(p.exitcode, o.read_text()) for p, o in zip(processes, outputs, strict=True)]


def succeed(folder: Path, size: int, *argv: list[str]) -> None:
    for code, output in start(folder, size, *argv):
        assert code == 0, output


def die_in_step(rank: int, number: signal.Signals = signal.SIGKILL) -> None:
    """The second process is killed in the middle of a step: the others wait for its features."""
    forward = PartialFC._forward

    def die(self: PartialFC, *arguments: Any) -> Any:
        if rank == 1 and self.training and self.step == 5:
            os.kill(os.getpid(), number)
        return forward(self, *arguments)

    PartialFC._forward = die  # type: ignore[method-assign]


def stop_in_step(rank: int) -> None:
    die_in_step(rank, signal.SIGSTOP)


def state(run: Path) -> dict[str, Any]:
    """All tensors of the last checkpoint, whole."""
    dcp_to_torch_save(run / checkpoint.LAST_SHARDED, run / "whole.pt")
    values = torch.load(run / "whole.pt", weights_only=True)
    (run / "whole.pt").unlink()
    shared = values.pop("shared")
    parts = ("backbone", "loss", "scaler", "trainer")
    values.update({name: shared["extra"][name] for name in parts})
    return {**values, "optimizer": shared["optimizer"], "tensors": shared["tensors"]}


def assert_close_state(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        error = (a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-6)
        assert error < 1e-4, where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close_state(x, y, f"{where}[{number}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4), where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=12, images=2)


def argv_of(faces: Path, run: Path, /, **sections: dict[str, Any]) -> list[str]:
    """State that does not depend on the number of processes: 4 epochs of 2 steps."""
    values: dict[str, dict[str, Any]] = {
        "model": {"freeze_bn": True},
        "loss": {"class": "class_bce"},
        "partial_fc": {"enabled": "always"},
        "data": {"flip": 0.0},
        "train": {"epochs": 4, "batch_size": 12, "schedule": "constant", "timeout_s": 20.0},
    }
    # Larger steps would make of the rounding of sums in another order something else.
    values["train"]["lr"] = 0.002
    for section, entries in sections.items():
        values.setdefault(section, {}).update(entries)
    return arguments(tiny(faces, run, **values))


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    succeed(run.parent, 2, argv_of(faces, run))
    return run


@pytest.mark.extended
def test_processes_make_no_difference(faces: Path, whole: Path, tmp_path: Path) -> None:
    succeed(tmp_path, 1, argv_of(faces, tmp_path / "one", run=SAVED_ONCE))
    assert len(losses(whole)) == 8
    assert losses(whole) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert_close_state(state(whole), state(tmp_path / "one"))

    # Whole class weights on every process, averaged like the backbone.
    for size in (1, 2):
        run = tmp_path / f"replicas{size}"
        argv = argv_of(faces, run, run=SAVED_ONCE, partial_fc={"enabled": "never"})
        succeed(tmp_path, size, argv)
        assert (run / checkpoint.LAST).is_file()
    ours, theirs = (losses(tmp_path / f"replicas{size}") for size in (2, 1))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.extended
@pytest.mark.parametrize("others", [(), (1, 3)], ids=str)
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    faces: Path, whole: Path, tmp_path: Path, others: tuple[int, ...]
) -> None:
    run = tmp_path / "run"
    (code, output), (killed, _) = start(tmp_path, 2, argv_of(faces, run), change=die_in_step)
    assert killed == -signal.SIGKILL
    assert code == LOST_PROCESS, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("error: lost another process of the run (")
    assert len(losses(run)) == 5  # the checkpoint is of the 4th step
    for size in others:
        shutil.copytree(run, tmp_path / f"on{size}")
        succeed(tmp_path, size, ["--resume", f"run.dir={tmp_path / f'on{size}'}"])
        assert losses(tmp_path / f"on{size}") == pytest.approx(losses(whole), rel=1e-4)
        assert_close_state(state(tmp_path / f"on{size}"), state(whole))
    succeed(tmp_path, 2, ["--resume", f"run.dir={run}"])
    assert losses(run) == losses(whole)
    assert_same_state(state(run), state(whole))


@pytest.mark.extended
def test_a_process_that_does_not_answer_is_given_up(faces: Path, tmp_path: Path) -> None:
    argv = argv_of(faces, tmp_path / "run", train={"timeout_s": 3.0})
    (code, output), _ = start(tmp_path, 2, argv, change=stop_in_step, patience=0.1)
    assert code == LOST_PROCESS, output
    assert output.splitlines()[-1].startswith("error: lost another process of the run (")


@pytest.mark.extended
def test_sampled_classes_with_float16_and_a_fused_optimizer(faces: Path, tmp_path: Path) -> None:
    """Batch statistics, dropout and augmentation, too: the same on as many processes."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"freeze_bn": False, "dropout": 0.1},
        "data": {"flip": 0.5, "shift": 0.1},
        "partial_fc": {"enabled": "auto", "sample_rate": 0.5, "fused_optimizer": "step"},
        "loss": {"class": "cosface", "memory": True},
        "train": {"amp": "fp16", "clip_norm": 1.0, "clip_classes": True},
    }
    succeed(tmp_path, 2, argv_of(faces, tmp_path / "whole", run=SAVED_ONCE, **sections))
    sections["train"]["epochs"] = 2
    succeed(tmp_path, 2, argv_of(faces, tmp_path / "cut", **sections))
    half = state(tmp_path / "cut")
    succeed(tmp_path, 2, ["--resume", f"run.dir={tmp_path / 'cut'}", "train.epochs=4"])
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole = state(tmp_path / "whole")
    assert_same_state(state(tmp_path / "cut"), whole)
    assert not torch.equal(half["head.loss.weight"], whole["head.loss.weight"])


# -- mistakes -------------------------------------------------------------------------------------


def test_a_mistake_of_one_process_ends_all(faces: Path, tmp_path: Path) -> None:
    broken = tmp_path / "faces"
    shutil.copytree(faces, broken)
    (broken / "person1" / "1.png").write_bytes(b"broken")
    # Not decoded before its step comes, and then by the process whose batch it is in.
    argv = argv_of(broken, tmp_path / "run", data={"cache": "never"})
    found = start(tmp_path, 2, argv)
    assert sorted(str(code) for code, _ in found) == sorted([str(USER_ERROR), str(LOST_PROCESS)])
    for code, output in found:
        assert "Traceback" not in output
        wanted = "1.png" if code == USER_ERROR else "lost another process of the run"
        assert wanted in output.splitlines()[-1]

    (broken / "person1" / "1.png").unlink()
    one, two = (argv_of(path, tmp_path / "other") for path in (faces, broken))
    for code, output in start(tmp_path, 2, one, two):
        assert code == USER_ERROR
        assert "data.path is not the same on all processes: process 0 has" in output
        assert "24 images (23), 2 of 'person1' (1)" in output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"class": "none"}, "partial_fc": {"enabled": "always"}}, "none is not among"),
        ({"partial_fc": {"enabled": "never", "sample_rate": 0.1}}, "needs shards of classes"),
        ({"partial_fc": {"sample_rate": 0.0}}, "above 0"),
        (
            {"partial_fc": {"fused_optimizer": "backward"}, "train": {"amp": "fp16"}},
            "train.amp=fp16 can scale .* use partial_fc.fused_optimizer=step",
        ),
        (
            {"partial_fc": {"fused_optimizer": "backward"}, "train": {"clip_classes": True}},
            "train.clip_classes=true can scale",
        ),
    ],
)
def test_contradictions_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(("test", sections))


def test_one_process_samples_and_fuses_and_keeps_its_format(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for fused in ("none", "backward"):
        partial = {"enabled": "auto", "sample_rate": 0.5, "fused_optimizer": fused}
        run = {"train": {"max_steps": 2}, "loss": {"pair": "none"}}
        argv = argv_of(faces, tmp_path / fused, partial_fc=partial, model={}, **run)
        assert main(argv) == 0
    assert losses(tmp_path / "none") == pytest.approx(losses(tmp_path / "backward"), rel=1e-5)
    plain = argv_of(faces, tmp_path / "plain", partial_fc={"enabled": "auto"}, train={"epochs": 1})
    assert main(plain) == 0
    assert (tmp_path / "plain" / checkpoint.LAST).is_file()
    capsys.readouterr()
    for name, change, held in (
        ("plain", "always", "no shards of classes"),
        ("none", "never", "partial_fc.sample_rate=0.5 needs shards"),
    ):
        argv = ["--resume", f"run.dir={tmp_path / name}", f"partial_fc.enabled={change}"]
        assert main(argv) == USER_ERROR
        assert held in capsys.readouterr().err
    # Another loss for the same classes.
    assert main(["--resume", f"run.dir={tmp_path / 'none'}", "loss.class=cosface"]) == USER_ERROR
    assert "loss.class=class_bce, not of cosface" in capsys.readouterr().err


# -- torchrun -------------------------------------------------------------------------------------


def _agent(argv: list[str], output: str) -> None:
    """As ``torchrun``, without the seconds that its imports take. It starts new processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    _write_to(output)
    torchrun(argv)


def start_agent(output: Path, script: str, argv: list[str], *options: str) -> Any:
    """A process, and of the processes that it starts, whose output is in a file."""
    arguments = [*options, script, *argv]
    process = forkserver().Process(target=_agent, args=(arguments, str(output)), daemon=True)
    process.start()
    return process


@pytest.mark.extended
def test_torchrun_ends_with_a_killed_process_and_two_nodes_go_on(
    faces: Path, whole: Path, tmp_path: Path
) -> None:
    script = tmp_path / "dying.py"
    script.write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        f"sys.path.append({str(ROOT / 'python_tests')!r})\n"
        "from test_train_partial_fc import die_in_step, main\n"
        "die_in_step(int(os.environ['RANK']))\nsys.exit(main())\n"
    )
    run = tmp_path / "run"
    output = tmp_path / "output"
    options = ("--standalone", "--nproc_per_node=2")
    dying = start_agent(output, str(script), argv_of(faces, run), *options)
    dying.join(timeout=90)
    assert dying.exitcode not in (None, 0)
    assert "Signal 9 (SIGKILL)" in output.read_text()
    assert len(losses(run)) == 5
    endpoint = f"--rdzv_endpoint=localhost:{free_port()}"
    common = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", endpoint)
    nodes = [
        start_agent(
            tmp_path / f"output{rank}",
            str(ROOT / "train" / "main.py"),
            ["--resume", f"run.dir={run}"],
            *common,
            f"--node_rank={rank}",
        )
        for rank in range(2)
    ]
    for rank, node in enumerate(nodes):
        node.join(timeout=120)
        assert node.exitcode == 0, (tmp_path / f"output{rank}").read_text()
    assert losses(run) == losses(whole)
    assert_same_state(state(run), state(whole))
