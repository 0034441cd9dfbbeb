"""The run folder: who may write it, and what is in it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from train.checkpoint import LAST, flush
from train.checkpoints import remove, remove_leftovers
from train.config import Config, to_yaml
from train.errors import UserError
from train.run_lock import RunLock

METRICS = "metrics.jsonl"
TABLE = "metrics.csv"  # the same in columns
EVALUATIONS = "evaluations.jsonl"
EVALUATION = "evaluation.json"
FEATURES = "features.npz"
CONFIG = "config.yaml"
_AT_THE_END = (EVALUATION, FEATURES, "report.html")
# Checkpoints first: a process that dies on the way must not leave them for a run to go on from.
_OURS = ("checkpoints", METRICS, TABLE, EVALUATIONS, *_AT_THE_END, CONFIG, "tensorboard")


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool, auto: bool = False) -> None:
    """Refuse early what :func:`prepare` could not do, without touching the disk.

    Args:
        resume: the run goes on from a checkpoint.
        overwrite: a run that is there may be moved aside.
        auto: one that was cut off before its first checkpoint may be begun again.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"run.dir: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: cannot write in {existing}")
    if resume or overwrite or not holds_run(folder) or (auto and _is_cut_off(folder)):
        return
    if auto:
        raise UserError(
            f"run.dir: {folder} holds a run without a checkpoint to go on from; name one, --resume "
            "CHECKPOINT, or begin again with run.overwrite=true on the command line, which moves "
            "the run aside"
        )
    raise UserError(
        f"run.dir: {folder} already holds a run; continue it with --resume, choose another "
        "run.dir, or begin again with run.overwrite=true on the command line, which moves the run "
        "aside"
    )


def holds_run(folder: Path) -> bool:
    return (folder / METRICS).exists() or _checkpoints(folder)


def _checkpoints(folder: Path) -> bool:
    """Whether there are any that are whole, by whatever name."""
    path = folder / LAST.parent
    return path.is_dir() and any(
        not name.endswith(".tmp") and not name.endswith(".new") for name in os.listdir(path)
    )


def _is_cut_off(folder: Path) -> bool:
    """Whether all there is of a run will come again if it begins again."""
    ended = any((folder / name).exists() for name in _AT_THE_END)
    return (folder / METRICS).exists() and not ended and not _checkpoints(folder)


def move_aside(folder: Path) -> Path | None:
    """Move aside whatever has the names of a run's files; where to, if there was any."""
    found = [name for name in _OURS if (folder / name).exists()]
    if not found:
        return None
    where = folder.resolve()
    for number in itertools.count(1):
        target = where.with_name(f"{where.name}.old-{number}")
        try:
            target.mkdir()
            break
        except FileExistsError:
            continue
    # What says that there is a run goes last: a process may die on the way.
    for name in sorted(found, key=lambda name: name == METRICS):
        os.rename(where / name, target / name)
    return target


def prepare(
    folder: Path,
    config: Config,
    *,
    resume_step: int | None,
    auto: bool = False,
    own: bool = True,
) -> Path | None:
    """Create the folder and write its configuration; where an earlier run was moved to, if any.

    A fresh run moves aside what an earlier one left; with ``auto`` it removes what is left of one
    that was cut off before its first checkpoint. A resumed run drops the metrics of steps that
    its checkpoint does not have, which are about to be run again; in a folder that is not its
    ``own`` it is like a fresh one.
    """
    moved = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (own and resume_step is not None) or (auto and _is_cut_off(folder)):
            # Of a resumed run only what describes its end, which it has yet to come to.
            for name in _OURS if resume_step is None else _AT_THE_END:
                remove(folder / name)
        else:
            moved = move_aside(folder)
        remove_leftovers(folder)
        lines = _until(folder / METRICS, resume_step)
        write_text(folder / METRICS, _json_lines(lines))
        write_text(folder / TABLE, _table(lines))
        write_text(folder / EVALUATIONS, _json_lines(_until(folder / EVALUATIONS, resume_step)))
        write_text(folder / CONFIG, to_yaml(config))
    except OSError as error:
        raise UserError(f"run.dir: cannot write in {folder}: {error.strerror}") from error
    return moved


def _until(path: Path, step: int | None) -> list[dict[str, Any]]:
    """Lines of the steps up to this one. A last line without an end is that of a dying process."""
    if step is None or not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        return [values for values in lines if values["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _json_lines(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(values) + "\n" for values in lines)


def _table(lines: list[dict[str, Any]]) -> str:
    """CSV, with the names of the columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if lines:
        writer.writerow(lines[0])
    writer.writerows(values.values() for values in lines)
    return text.getvalue()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error while writing has no file's name of its own."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _named(path):
            temporary.write_text(text)
            flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """An .npz file."""
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    try:
        with _named(path):
            np.savez(temporary, **arrays)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def evaluated_steps(folder: Path) -> set[int]:
    """Steps of which ``evaluations.jsonl`` has figures."""
    path = folder / EVALUATIONS
    if not path.exists():
        return set()
    return {json.loads(line)["step"] for line in path.read_text().splitlines()}


class MetricsLog:
    """Appends to the files of figures and, when asked to, to TensorBoard events."""

    def __init__(self, folder: Path, *, tensorboard: bool, first_step: int) -> None:
        self._folder = folder
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._files: dict[str, TextIO] = {
            name: open(folder / name, "a")  # noqa: SIM115
            for name in (METRICS, TABLE, EVALUATIONS)
        }

    def write(self, values: dict[str, Any]) -> None:
        self._append(METRICS, json.dumps(values) + "\n")
        header, row = _table([values]).splitlines(keepends=True)
        self._append(TABLE, row if self._files[TABLE].tell() else header + row)
        self._plot("train", values, values["step"])

    def write_evaluation(
        self, step: int, epoch: float, figures: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Figures of every test set, by its name."""
        for name, values in figures.items():
            self._plot(f"eval/{name}", values, step)
        line = {"step": step, "epoch": epoch, "eval": figures}
        self._append(EVALUATIONS, json.dumps(line) + "\n")

    def _append(self, name: str, text: str) -> None:
        with _named(self._folder / name):
            self._files[name].write(text)
            self._files[name].flush()

    def _plot(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # every line has been flushed, or has raised
                file.close()
        if self._writer is not None:
            self._writer.close()


class RunFolder:
    """A run's folder from the start of its process to the end, which no other run may write."""

    def __init__(self, folder: Path, *, resume: bool, overwrite: bool, auto: bool) -> None:
        """``resume``: a run goes on that is in it."""
        self.folder, self.lock = folder, RunLock(folder)
        self.resume, self.overwrite, self.auto = resume, overwrite, auto

    def check(self) -> None:
        """Refuse early what :meth:`prepare` could not do; nothing is written but a lock."""
        check_run_folder(self.folder, resume=self.resume, overwrite=self.overwrite, auto=self.auto)
        if self.folder.is_dir():
            self._take()

    def _take(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.take()
        except OSError as error:
            raise UserError(f"run.dir: cannot write in {self.folder}: {error.strerror}") from error

    def prepare(self, config: Config, *, resume_step: int | None) -> Path | None:
        """:func:`prepare`, where no other run has come first."""
        self._take()
        self.check()
        return prepare(
            self.folder, config, resume_step=resume_step, auto=self.auto, own=self.resume
        )

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def last_checkpoint(folder: Path) -> Path:
    return folder / LAST
