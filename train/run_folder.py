"""The run folder: who may write it, and what is in it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

from train.checkpoint import LAST
from train.config import Config, to_yaml
from train.errors import UserError

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
_OURS = (METRICS, CONFIG, "evaluation.json", "checkpoints", "tensorboard")


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse early what :func:`prepare` could not do, without touching the disk."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"run.dir: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: cannot write in {existing}")
    if (folder / METRICS).exists() and not resume and not overwrite:
        raise UserError(
            f"run.dir: {folder} already holds a run; continue it with --resume, choose another "
            "run.dir, or replace it with run.overwrite=true"
        )


def prepare(folder: Path, config: Config, *, resume_step: int | None) -> None:
    """Create the folder and write its configuration.

    A fresh run removes what an earlier one left. A resumed run drops the metrics of steps that
    its checkpoint does not know, which are about to be run again.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = ""
        if resume_step is None:
            for name in _OURS:
                _remove(folder / name)
        elif (folder / METRICS).exists():
            lines = (folder / METRICS).read_text().splitlines()
            kept = "".join(f"{x}\n" for x in lines if json.loads(x)["step"] <= resume_step)
        write_text(folder / METRICS, kept)
        write_text(folder / CONFIG, to_yaml(config))
    except OSError as error:
        raise UserError(f"run.dir: cannot write in {folder}: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder / METRICS} is damaged: {error}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


class MetricsLog:
    """Appends to ``metrics.jsonl`` and, when asked to, to TensorBoard events."""

    def __init__(self, folder: Path, *, tensorboard: bool, first_step: int) -> None:
        self._file: TextIO = open(folder / METRICS, "a")  # noqa: SIM115
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(f"train/{name}", value, values["step"])

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def last_checkpoint(folder: Path) -> Path:
    return folder / LAST
