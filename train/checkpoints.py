"""Which checkpoints a run keeps beside the last one: some earlier ones, and the best.

``last.pt`` is written; ``step-000123.pt`` and ``best.pt`` are further names of the same file (of
the files in it, where the checkpoint is a folder), which take no time and no room. Nothing writes
into a checkpoint that exists, so names do not affect each other.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.checkpoint import LAST, DamagedError, exists, flush, read_run
from train.errors import UserError

_STEP = re.compile(r"step-(\d+)(\.pt)?")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(run_dir: Path) -> None:
    """What processes that died while they wrote or removed a checkpoint left of it."""
    for path in (run_dir / LAST.parent).glob(".*.tmp"):
        remove(path)


def keep_last(last: Path, step: int, count: int) -> None:
    """Keep ``last`` by the name of its step, and of such names the last ``count`` only.

    One more name is of no use for a single one. Checkpoints of later steps go too: they are of a
    course that this run has left.
    """
    try:
        if count > 1:
            _name(last, f"step-{step:06d}{last.suffix}")
        steps = _steps(last)
        passed = sorted((n for n in steps.values() if n <= step), reverse=True)
        kept = passed[:count] if count > 1 else []
        for path, number in steps.items():
            if number not in kept:
                _discard(path)
    except OSError as error:
        raise UserError(f"cannot keep checkpoint {last}: {error}") from error


def newest(last: Path) -> Path:
    """``last``, or where it has been lost the newest of those that are kept beside it."""
    if not exists(last):
        for path in (last.with_suffix(""), last.with_suffix(".pt")):
            for other in _others(path):
                _warn(f"checkpoint {last} is missing; going on from {other}")
                return other
    return last


def read_or_earlier(path: Path, *, take: bool) -> tuple[Path, dict[str, Any]]:
    """A run's checkpoint for resuming; where it is damaged, the one before it if that may be taken.

    Raises:
        UserError: it cannot be read. What can be is named.
    """
    try:
        return path, read_run(path)
    except DamagedError as error:
        return _earlier(path, error, take)


def load_or_earlier(
    load: Callable[[dict[str, Any], Path], None], values: dict[str, Any], path: Path, *, take: bool
) -> None:
    """``load(values, path)``. Every process calls: what is in shards is found damaged here only."""
    while True:
        try:
            return load(values, path)
        except DamagedError as error:
            path, values = _earlier(path, error, take)


def _earlier(path: Path, error: DamagedError, take: bool) -> tuple[Path, dict[str, Any]]:
    for other in _others(path):
        try:
            values = read_run(other)
        except UserError:
            continue
        if not take:
            raise DamagedError(f"{error}; --resume {other} goes on from step {_step(values)}")
        _warn(f"{error}; going on from {other}")
        return other, values
    raise DamagedError(f"{error}; no earlier checkpoint is kept here (run.keep)") from error


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def _step(values: dict[str, Any]) -> int:
    return int(values["trainer"]["step"])


def _others(path: Path) -> list[Path]:
    """Checkpoints to try after this one: by step, the last first, then the best.

    A further name of the same checkpoint is left out.
    """
    best = path.with_name(f"best{path.suffix}")
    if path == best:
        return []
    steps = _steps(path)
    own = steps.pop(path, None)
    tried = sorted((p for p in steps if own is None or steps[p] < own), key=steps.__getitem__)
    found = [*reversed(tried), best]
    return [p for p in found if exists(p) and not _same(p, path)]


def _steps(last: Path) -> dict[Path, int]:
    """Checkpoints that are kept by the names of their steps, in the folder of ``last``."""
    return {
        path: int(match[1])
        for path in last.parent.glob("*")
        if (match := _STEP.fullmatch(path.name)) and path.suffix == last.suffix
    }


def _same(a: Path, b: Path) -> bool:
    """Of folders it is their indexes that tell."""
    names = [p / "index.json" if p.is_dir() else p for p in (a, b)]
    return all(p.exists() for p in names) and os.path.samefile(*names)


def keep_best(last: Path) -> None:
    try:
        _name(last, f"best{last.suffix}")
    except OSError as error:
        raise UserError(f"cannot keep checkpoint {last}: {error}") from error


def _name(last: Path, name: str) -> None:
    """One more name for a checkpoint. A reader sees what was there by that name, or this one."""
    target = last.with_name(name)
    temporary = last.with_name(f".{name}.{os.getpid()}.tmp")
    remove(temporary)
    if last.is_dir():
        shutil.copytree(last, temporary, copy_function=_link)
        flush(temporary)
        # A folder cannot be renamed over another; readers know this place, too.
        old = last.with_name(f".{name}.old")
        if target.exists():
            remove(old)
            os.rename(target, old)
        os.rename(temporary, target)
        remove(old)
    else:
        _link(last, temporary)
        os.replace(temporary, target)
    flush(last.parent)


def _link(source: str | Path, target: str | Path) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system without second names
        shutil.copy2(source, target)
    return str(target)


def _discard(path: Path) -> None:
    """Out of sight first: half a folder is no checkpoint."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    os.rename(path, hidden)
    remove(hidden)
