"""Which checkpoints a run keeps beside the last one: some earlier ones, and the best.

``last.pt`` is written; ``step-000123.pt`` and ``best.pt`` are further names of the same file (of
the files in it, where the checkpoint is a folder), which take no time and no room. Nothing writes
into a checkpoint that exists, so names do not affect each other.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from train.checkpoint import LAST, flush
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
        steps = {
            path: int(match[1])
            for path in last.parent.iterdir()
            if (match := _STEP.fullmatch(path.name)) and path.suffix == last.suffix
        }
        passed = sorted((n for n in steps.values() if n <= step), reverse=True)
        kept = passed[:count] if count > 1 else []
        for path, number in steps.items():
            if number not in kept:
                _discard(path)
    except OSError as error:
        raise UserError(f"cannot keep checkpoint {last}: {error}") from error


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
