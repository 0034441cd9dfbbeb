"""The run folder: the lock of its one writer, and the files in it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.checkpoint import LAST, remove
from train.config import Config, to_yaml
from train.errors import UserError, reported
from train.small_files import replacing
from train.trackers import Tracker, numbers

try:
    import fcntl
except ImportError:  # not on Windows, where two starts in one folder are not detected
    fcntl = None  # type: ignore[assignment]

METRICS = "metrics.jsonl"
TABLE = "metrics.csv"  # the same in columns
EVALUATIONS = "evaluations.jsonl"
EVALUATION = "evaluation.json"
FEATURES = "features.npz"
CONFIG = "config.yaml"
LOCK = ".lock"
_AT_THE_END = (EVALUATION, FEATURES, "report.html")
# Checkpoints first: a process that dies on the way must not leave them for a run to go on from.
_TRACKED = ("tensorboard", "wandb")  # folders of train/trackers.py
_OURS = ("checkpoints", METRICS, TABLE, EVALUATIONS, *_AT_THE_END, CONFIG, *_TRACKED)


# -- the lock ---------------------------------------------------------------------------------

_held: set[int] = set()


def _close_in_child() -> None:
    """A lock is held as long as any copy of its descriptor is open."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """Held from :meth:`take` until :meth:`release`, or until the process ends, however it does."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self.descriptor: int | None = None

    def take(self) -> None:
        """Raises a UserError where another process, or another run of this one, has the folder."""
        if fcntl is None or self.descriptor is not None:
            return
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise UserError(
                    f"run.dir: {self.path.parent} is being written by another run"
                    f"{f' ({holder})' if holder else ''}; choose another run.dir"
                ) from error
            except OSError:  # a file system without locks
                os.close(descriptor)
                return
            # The holder before may have removed the file in the meantime.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(descriptor)
        self.descriptor = descriptor

    def release(self) -> None:
        if self.descriptor is not None:
            self.path.unlink(missing_ok=True)
            _held.discard(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


# -- the folder -------------------------------------------------------------------------------


class RunFolder(RunLock):
    """A run's folder, which no other run may write until this one is released."""

    def __init__(self, folder: Path, *, resume: bool, overwrite: bool, auto: bool) -> None:
        """
        Args:
            resume: the run that is in the folder goes on.
            overwrite: a run that is there may be moved aside.
            auto: one that was cut off before its first checkpoint may begin again.
        """
        super().__init__(folder)
        self.folder, self.resume, self.overwrite, self.auto = folder, resume, overwrite, auto

    def check(self) -> None:
        """Refuse early what :meth:`prepare` could not do; nothing is written but a lock."""
        folder = self.folder
        existing = next((p for p in (folder, *folder.parents) if p.exists()), folder)
        if not existing.is_dir():
            raise UserError(f"run.dir: {existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"run.dir: cannot write in {existing}")
        may_begin = self.resume or self.overwrite or (self.auto and _is_cut_off(folder))
        if not may_begin and ((folder / METRICS).exists() or _has_checkpoints(folder)):
            raise UserError(
                f"run.dir: {folder} holds a run without a checkpoint to go on from; name one, "
                "--resume CHECKPOINT, or begin again with run.overwrite=true on the command line, "
                "which moves the run aside"
                if self.auto
                else f"run.dir: {folder} already holds a run; continue it with --resume, choose "
                "another run.dir, or begin again with run.overwrite=true on the command line, "
                "which moves the run aside"
            )
        if folder.is_dir():
            self._lock()

    def _lock(self) -> None:
        with reported(f"run.dir: cannot write in {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.take()

    def prepare(self, config: Config, *, resume_step: int | None) -> Path | None:
        """:func:`prepare`, where no other run has come first."""
        self._lock()
        self.check()
        given = {"auto": self.auto, "own": self.resume}
        return prepare(self.folder, config, resume_step=resume_step, **given)


def _has_checkpoints(folder: Path) -> bool:
    """True where there is a whole one, by any name."""
    path = folder / LAST.parent
    return path.is_dir() and any(not n.endswith((".tmp", ".new")) for n in os.listdir(path))


def _is_cut_off(folder: Path) -> bool:
    """True where all that there is of a run will come again if it begins again."""
    ended = any((folder / name).exists() for name in _AT_THE_END)
    return (folder / METRICS).exists() and not ended and not _has_checkpoints(folder)


def _move_aside(folder: Path) -> Path | None:
    """Move aside whatever has the names of a run's files; where to, if there was any."""
    found = [name for name in _OURS if (folder / name).exists()]
    if not found:
        return None
    where = folder.resolve()
    for number in itertools.count(1):
        target = where.with_name(f"{where.name}.old-{number}")
        with suppress(FileExistsError):
            target.mkdir()
            break
    # The mark of a run goes last: a process may die on the way.
    for name in sorted(found, key=lambda name: name == METRICS):
        os.rename(where / name, target / name)
    return target


def prepare(
    folder: Path, config: Config, *, resume_step: int | None, auto: bool = False, own: bool = True
) -> Path | None:
    """Create the folder and write its configuration; where an earlier run was moved to, if any.

    A fresh run moves aside what an earlier one left; with ``auto`` it removes what is left of one
    that was cut off before its first checkpoint. A resumed run drops the metrics of steps that
    its checkpoint does not have, which are about to be run again; in a folder that is not its
    ``own`` it is like a fresh one.
    """
    moved = None
    with reported(f"run.dir: cannot write in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if (own and resume_step is not None) or (auto and _is_cut_off(folder)):
            # A resumed run removes only what describes its end, which is still ahead.
            for name in _OURS if resume_step is None else _AT_THE_END:
                remove(folder / name)
        else:
            moved = _move_aside(folder)
        # Leftovers of processes that died while they wrote or removed something.
        unfinished = [f".{name}.*.tmp" for name in _OURS]
        for pattern in (f"{LAST.parent}/.*.tmp", *unfinished):
            for path in folder.glob(pattern):
                remove(path)
        lines = _until(folder / METRICS, resume_step)
        write_text(folder / METRICS, _json_lines(lines))
        write_text(folder / TABLE, _table(lines))
        write_text(folder / EVALUATIONS, _json_lines(_until(folder / EVALUATIONS, resume_step)))
        write_text(folder / CONFIG, to_yaml(config))
    return moved


# -- its files --------------------------------------------------------------------------------


def _until(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Lines of the steps up to this one. A last line without an end is that of a dying process."""
    if step is None or not path.exists():
        return []
    with reported(f"{path} is damaged", ValueError, KeyError, TypeError):
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        return [values for values in lines if values["step"] <= step]


def _json_lines(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(values) + "\n" for values in lines)


def _table(lines: list[dict[str, Any]], columns: Sequence[str] = ()) -> str:
    """CSV; without given columns with all that any line has, and their names."""
    text = io.StringIO()
    names = columns or [*dict.fromkeys(name for line in lines for name in line)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    if names and not columns:
        writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error while writing has no file's name of its own."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    with _named(path), replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """An .npz file."""
    with _named(path), replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def evaluated_steps(folder: Path) -> set[int]:
    """Steps with metrics in ``evaluations.jsonl``."""
    path = folder / EVALUATIONS
    lines = path.read_text().splitlines() if path.exists() else []
    return {json.loads(line)["step"] for line in lines}


class MetricsLog:
    """Appends to the files of metrics, and gives the numbers to ``trackers``."""

    def __init__(self, folder: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._folder, self._trackers = folder, trackers
        self._read_columns()

    def _read_columns(self) -> None:
        with open(self._folder / TABLE, "a+", newline="") as table:
            table.seek(0)
            self._columns = next(csv.reader(table), [])

    def write(self, values: dict[str, Any]) -> None:
        self._append(METRICS, _json_lines([values]))
        if values.keys() <= set(self._columns):
            self._append(TABLE, _table([values], self._columns))
        else:  # the first line, or one of a later version
            write_text(self._folder / TABLE, _table(read_metrics(self._folder)))
            self._read_columns()
        self._track("train", values, values["step"])

    def write_evaluation(
        self, step: int, epoch: float, metrics: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Metrics of every test set, by its name."""
        self._track("eval", metrics, step)
        self._append(EVALUATIONS, _json_lines([{"step": step, "epoch": epoch, "eval": metrics}]))

    def _append(self, name: str, text: str) -> None:
        with _named(self._folder / name), open(self._folder / name, "a") as file:
            file.write(text)

    def _track(self, group: str, values: Mapping[str, Any], step: int) -> None:
        for tracker in self._trackers:
            tracker.add(dict(numbers(values, group)), step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
