"""The commands as a user starts them; few, since each process imports torch anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.training import ROOT, arguments, tiny, write_faces
from test_train_partial_fc import start as start_ranks

from train import checkpoint
from train.__main__ import main
from train.distributed import choose_device
from train.errors import INTERRUPTED, USER_ERROR, UserError, explained
from train.run_folder import read_metrics
from train.stopping import stop_on_signal

MAIN = str(ROOT / "train" / "main.py")
MODULE = ["-m", "train"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )


def test_script_trains_from_any_folder_with_a_progress_bar(tmp_path: Path) -> None:
    write_faces(tmp_path / "faces")
    config = tiny(Path("faces"), Path("run"), run={"progress": True})
    done = start([sys.executable, MAIN, *arguments(config)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16 images of 4 identities, conv4 at 16" in done.stdout
    assert "b/s" in done.stderr
    assert "images/s" in done.stderr
    assert len(read_metrics(tmp_path / "run")) == 4


@pytest.mark.parametrize("program", [[MAIN], MODULE], ids=["script", "module"])
def test_a_mistake_is_reported_in_one_line(tmp_path: Path, program: list[str]) -> None:
    done = start([sys.executable, *program, "train.speed=9"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: command line: unknown key 'train.speed'")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "memory",
    [pytest.param(False, id="the batch's pairs"), pytest.param(True, id="memory")],
)
@pytest.mark.extended
def test_two_processes_finish_and_their_loss_falls(tmp_path: Path, memory: bool) -> None:
    """One by torchrun, as a user starts it; the other without imports that take seconds."""
    config = tiny(
        write_faces(tmp_path / "faces", identities=6, images=8),
        tmp_path / "run",
        data={"holdout": 2},
        loss={"memory": memory},
        train={"epochs": 6, "batch_size": 16, "lr": 0.02},
    )
    if memory:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = start([sys.executable, *torchrun, *MODULE, *arguments(config)], tmp_path)
        assert done.returncode == 0, done.stderr
        output = done.stdout
    else:
        found = start_ranks(tmp_path, 2, arguments(config))
        assert [code for code, _ in found] == [0, 0], found
        output = "".join(text for _, text in found)
    assert output.count("2 process(es)") == 1  # only the first one talks
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    # The class loss is there from the first step on.
    losses = [line["class_loss"] for line in lines]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert checkpoint.is_sharded(checkpoint.last(tmp_path / "run"))
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_first_signal_asks_to_stop_and_the_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is before  # a second one is not caught
    assert signal.getsignal(signal.SIGTERM) is before
    assert INTERRUPTED == 130


@pytest.mark.parametrize("command", [[MAIN], MODULE, [str(ROOT / "train" / "evaluate.py")]])
def test_interrupt_while_torch_is_imported(command: list[str], tmp_path: Path) -> None:
    # Not by a signal: a process that was started in the background may ignore it.
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, *command, "run.dir=x"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (INTERRUPTED, "interrupted\n")


def test_closed_pipe() -> None:
    """As ``command | head`` does not, before the end and before the last of it is written."""
    for count in (10**6, 10):
        code = f"from train.errors import exit_code; exit(exit_code(lambda: print('x' * {count})))"
        read, write = os.pipe()
        os.close(read)
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                stdout=write,
                stderr=subprocess.PIPE,
                timeout=60,
                check=False,
            )
        finally:
            os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")


def test_asking_for_a_missing_gpu_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto", 0).type == "cpu"
    with pytest.raises(UserError, match="no CUDA device"):
        choose_device("cuda", 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert choose_device("auto", 0).index == 0
    with pytest.raises(UserError, match="process 1 has no GPU: 1 here"):
        choose_device("auto", 1)


def test_unknown_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serch", "x.jpg"]) == USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: unknown command 'serch'; commands: embed, compare,")


def test_packages_of_the_extra_are_named() -> None:
    said = explained(ModuleNotFoundError("No module named 'yaml'", name="yaml"))
    assert str(said) == "the package yaml is not installed; pip install -e '.[train]'"
    assert explained(ModuleNotFoundError("No module named 'train.x'", name="train.x")) is None


def test_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "a.jpg", "b.jpg"]) == USER_ERROR
    assert (
        capsys.readouterr().err
        == "error: no run in runs/train; name a model by --checkpoint PATH\n"
    )
