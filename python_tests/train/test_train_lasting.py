"""Whatever a run waits for or cannot have: it ends soon, with one line."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import forkserver
from support.training import arguments, losses, tiny, train, write_faces
from test_train_partial_fc import _process, free_port, start

from train import checkpoint, run_folder, stopping
from train.data.records import Files
from train.distributed import place
from train.errors import INTERRUPTED, USER_ERROR, UserError, explained
from train.evaluation import embed
from train.main import main
from train.run_folder import RunLock
from train.train_step import TrainStep
from train.trainer import Trainer

SECONDS = 0.5
TERMINATED = 128 + signal.SIGTERM

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits are POSIX")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=6, images=4)


def last_line(output: str) -> str:
    assert "Traceback" not in output
    return output.strip().splitlines()[-1]


# -- signals --------------------------------------------------------------------------------------


def _never(*given: Any, **named: Any) -> None:
    os.kill(int(os.environ["TRAINING"]), signal.SIGTERM)
    time.sleep(60)


def _waits(owner: Any, name: str) -> None:
    """In the process of a run: from there on it gets a signal and waits."""
    stopping.PATIENCE_S = SECONDS
    os.environ["TRAINING"] = str(os.getpid())
    setattr(owner, name, _never)


def in_a_read(rank: int) -> None:
    _waits(Files, "read")


def in_a_checkpoint(rank: int) -> None:
    _waits(torch, "save")


def in_a_step(rank: int) -> None:
    _waits(TrainStep, "__call__")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_a_run_that_waits_for_images(
    faces: Path, tmp_path: Path, workers: int
) -> None:
    config = tiny(faces, tmp_path / "run", data={"cache": "never", "workers": workers})
    begin = time.monotonic()
    ((code, output),) = start(tmp_path, 1, arguments(config), change=in_a_read)
    assert code == TERMINATED, output
    assert last_line(output).startswith("ended by SIGTERM")
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize("change", [in_a_checkpoint, in_a_step])
def test_a_signal_ends_a_run_and_the_checkpoint_of_before_stays(
    faces: Path, tmp_path: Path, change: Callable[[int], None]
) -> None:
    run = tmp_path / "run"
    train(tiny(faces, run, train={"max_steps": 1}))
    given = ["--resume", f"run.dir={run}", "train.max_steps=2"]
    ((code, output),) = start(tmp_path, 1, given, change=change)
    assert code == TERMINATED, output
    assert checkpoint.read_run(run / checkpoint.LAST)["trainer"]["step"] == 1
    # The lock went with the process, and what it left does not matter.
    assert main(given) == 0


def _one_stands_still(rank: int) -> None:
    """The second process is halted in its second step, then the first is stopped by a signal."""
    stopping.PATIENCE_S = SECONDS
    end_step = Trainer._end_step

    def halt(self: Trainer, stopped: int) -> int:
        cut_off = end_step(self, stopped)
        if rank == 1 and self.step == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank == 0 and self.step == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return cut_off

    Trainer._end_step = halt  # type: ignore[method-assign]


def test_a_signal_ends_a_process_that_waits_for_another(faces: Path, tmp_path: Path) -> None:
    given = arguments(tiny(faces, tmp_path / "run", train={"timeout_s": 600.0}))
    (code, output), _ = start(tmp_path, 2, given, change=_one_stands_still, patience=0.1)
    assert code == TERMINATED, output
    assert "ended by SIGTERM" in output


def test_an_evaluation_is_left_for_the_next_run(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_sum, calls = embed._flip_sum, [0]

    def signaled(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return flip_sum(*given)

    monkeypatch.setattr(embed, "_flip_sum", signaled)
    monkeypatch.setattr("train.evaluation.embed.BATCH_SIZE", 1)
    sections: dict[str, Any] = {"data": {"holdout": 2}, "eval": {"every": 2}}
    given = arguments(tiny(faces, tmp_path / "run", train={"max_steps": 3}, **sections))
    assert main(given) == 0
    assert capsys.readouterr().err == "stopped at step 2 of 3; continue with --resume\n"
    assert (tmp_path / "run" / "evaluations.jsonl").read_text() == ""
    assert main([*given, "--resume", "auto"]) == 0
    assert (tmp_path / "run" / "evaluations.jsonl").read_text().count("\n") == 2


def _interrupt_the_start(rank: int) -> None:
    stopping.PATIENCE_S = SECONDS
    # Processes in the background of a shell ignore it, and hand that down.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    join = torch.distributed.init_process_group

    def interrupted(*given: Any, **named: Any) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        join(*given, **named)

    torch.distributed.init_process_group = interrupted


def test_an_interruption_ends_a_process_without_a_join(faces: Path, tmp_path: Path) -> None:
    """It waits for the others without a handler of its own."""
    process = forkserver().Process(
        target=_process,
        args=(
            *(0, 2, free_port(), str(tmp_path / "output")),
            arguments(tiny(faces, tmp_path / "run")),
            _interrupt_the_start,
        ),
    )
    process.start()
    process.join(timeout=30)
    process.kill()
    assert process.exitcode == INTERRUPTED, (tmp_path / "output").read_text()


# -- what there is too little of ------------------------------------------------------------------


def _small_files(rank: int) -> None:
    """A limit on files makes shared memory end, too, as a full tmpfs does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


def test_shared_memory_that_is_too_small_is_one_line(faces: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"input_size": 64},
        "data": {"cache": "never", "workers": 2},
        "train": {"max_steps": 1},
    }
    given = arguments(tiny(faces, tmp_path / "run", **sections))
    ((code, output),) = start(tmp_path, 1, given, change=_small_files)
    assert code == USER_ERROR, output
    assert "shared memory is too small" in last_line(output)
    assert "--shm-size" in last_line(output)
    assert "data.workers=0" in last_line(output)


def test_a_disk_that_is_full_is_one_line_and_the_checkpoint_stays(
    faces: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny(faces, run, train={"max_steps": 1}))
    given = ["--resume", f"run.dir={run}", "train.max_steps=2"]
    ((code, output),) = start(tmp_path, 1, given, change=_small_files)
    assert code == USER_ERROR, output
    assert last_line(output).startswith("error: cannot write checkpoint ")
    assert checkpoint.read_run(run / checkpoint.LAST)["trainer"]["step"] == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.pt"]


def test_what_the_machine_lacks_is_one_line() -> None:
    full = explained(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"))
    assert str(full) == "cannot write metrics.jsonl: No space left on device"
    for error, said in (
        (OSError(errno.EMFILE, "Too many open files"), "cannot open: Too many open files"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB. ..."), "out of memory: CUDA"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "signal: Killed"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "--shm-size"),
    ):
        assert said in str(explained(error))
    for error in (KeyError("x"), RuntimeError("shapes differ"), OSError("no number")):
        assert explained(error) is None


# -- several processes ----------------------------------------------------------------------------


def test_a_port_in_use_is_one_line(faces: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        process = forkserver().Process(
            target=_process,
            args=(
                *(0, 2, other.getsockname()[1], str(tmp_path / "output")),
                arguments(tiny(faces, tmp_path / "run")),
                None,
            ),
        )
        process.start()
        process.join(timeout=60)
        process.kill()
    output = (tmp_path / "output").read_text()
    assert process.exitcode == USER_ERROR, output
    line = last_line(output)
    assert line.startswith("error: localhost:")
    assert line.endswith("is in use by another program; choose another MASTER_PORT")


FULL = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR not set beside RANK=1, WORLD_SIZE=2"),
        ({"MASTER_ADDR": "", "MASTER_PORT": None}, "MASTER_ADDR, MASTER_PORT not set beside"),
        ({"RANK": None}, "RANK not set beside WORLD_SIZE=2"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE not set beside RANK=1"),
        ({"RANK": "2"}, "RANK=2: expected a number below WORLD_SIZE=2"),
        ({"RANK": "one"}, "RANK: expected a whole number, got 'one'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE: expected a whole number, got '-2'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: expected a number between 1 and 65535"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: expected a whole number"),
        (
            {**dict.fromkeys(FULL), "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
            "srun has started several processes .* RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are",
        ),
        (
            {**dict.fromkeys(FULL), "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
            "mpirun has started several",
        ),
    ],
)
def test_half_a_description_of_a_process_is_refused(
    change: dict[str, str | None], message: str
) -> None:
    given = {name: value for name, value in {**FULL, **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        place(given)


def test_a_process_by_itself_and_one_of_several() -> None:
    assert place(FULL) == (1, 2, 0)
    assert place({**FULL, "LOCAL_RANK": "1"}) == (1, 2, 1)
    assert place({}) == place({"WORLD_SIZE": "1"}) == (0, 1, 0)
    # A job of several tasks whose script starts one process.
    assert place({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == (0, 1, 0)


# -- one folder, several starts -------------------------------------------------------------------


def test_a_folder_that_is_being_written_is_refused(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = arguments(tiny(faces, run, train={"max_steps": 1}))
    run.mkdir()
    with RunLock(run) as lock:
        lock.take()
        for more in ([], ["run.overwrite=true"], ["--resume", "auto"]):
            assert main([*given, *more]) == USER_ERROR
            error = capsys.readouterr().err
            assert f"{run} is being written by another run (process {os.getpid()} on " in error
    assert list(run.iterdir()) == []
    assert main(given) == 0


def test_a_lock_ends_with_its_process_whatever_processes_it_has_left(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    (read, write), (ready, started) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.write(started, b"x")
        os.read(read, 1)
        os._exit(0)
    os.read(ready, 1)
    assert lock.descriptor is not None
    run_folder._held.discard(lock.descriptor)
    os.close(lock.descriptor)  # as the kernel does
    with RunLock(tmp_path) as again:
        again.take()
    for end in (write, read, ready, started):
        os.close(end)
    os.waitpid(child, 0)


def test_of_two_starts_at_the_same_time_one_has_the_folder(faces: Path, tmp_path: Path) -> None:
    """In threads of one process, where signals are the caller's."""
    run = tmp_path / "run"
    given = arguments(tiny(faces, run, train={"max_steps": 2}))
    before = signal.getsignal(signal.SIGTERM)
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(main(given))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(codes) == [0, USER_ERROR]
    assert len(losses(run)) == 2
    assert signal.getsignal(signal.SIGTERM) is before
