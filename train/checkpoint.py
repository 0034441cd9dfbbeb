"""Checkpoints: written whole or not at all, read without unpickling code, and kept.

A run with whole class weights has a file, one with shards a folder of all processes' parts.
``last.pt`` is written; ``step-000123.pt`` and ``best.pt`` are further names of the same file (of
the files in it, where the checkpoint is a folder), which take no time and no room. Nothing writes
into a checkpoint that exists, so names do not affect each other.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unitsface_kernels as uk
from train.backbones.foreign import in_rgb
from train.backbones.weights import differences, find_state, recognize, sizes
from train.config import Config
from train.errors import UserError, reported
from train.small_files import flush, replacing

LAST = Path("checkpoints") / "last.pt"
LAST_SHARDED = Path("checkpoints") / "last"
FORMAT = 1
# The parts of a run's file; a folder of shards has the optimizer's elsewhere.
_PARTS = {"config": dict, "trainer": dict, "backbone": dict, "loss": dict, "scaler": dict}
_BEST = {"figure": str, "value": int | float, "step": int}
_STEP = re.compile(r"step-(\d+)(\.pt)?")


class DamagedError(UserError):
    """A checkpoint that cannot be read; an earlier one may be."""


# -- where they are ---------------------------------------------------------------------------


def last(run_dir: Path) -> Path:
    """The place of a run's last checkpoint, written or not."""
    sharded = run_dir / LAST_SHARDED
    return sharded if is_sharded(sharded) else run_dir / LAST


def found(path: Path) -> Path:
    """A checkpoint as given, or the last one of a run's folder or its folder of checkpoints."""
    if path.is_dir() and path.name == LAST.parent.name and not (path / path.name).is_dir():
        return last(path.parent)
    return last(path) if path.is_dir() and not uk.partial_fc.is_checkpoint(path) else path


def exists(path: Path) -> bool:
    return path.is_file() or is_sharded(path)


def is_sharded(path: Path) -> bool:
    # Where there is no folder, one that was about to be replaced may be beside it.
    return path.is_dir() or path.with_name(f".{path.name}.old").is_dir()


# -- reading ----------------------------------------------------------------------------------


def read(path: Path) -> Any:
    """The contents of a file, or of a folder of shards the part that all processes share."""
    try:
        if is_sharded(path):
            return uk.partial_fc.read_extra(path)
        # Lightning's hold callbacks and the like, which are not read.
        return uk.partial_fc.read_saved(path, unknown=path.suffix == ".ckpt")
    except FileNotFoundError as error:
        raise UserError(f"no such checkpoint: {path}") from error
    except OSError as error:
        raise DamagedError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(str(error)) from error


def read_any(path: Path) -> tuple[Path, Any]:
    """Path and contents of a file, a folder of shards, or the last checkpoint of a run folder."""
    path = found(path)
    values = in_rgb(read(path), path)
    if is_run(values):
        _check_run(values, path, ("config", "trainer"))
    return path, values


def is_run(values: Any) -> bool:
    return isinstance(values, dict) and type(values.get("format")) is int and "trainer" in values


def read_run(path: Path) -> dict[str, Any]:
    """A checkpoint of this harness, for resuming; without what is in shards."""
    values = read(path)
    if not is_run(values):
        raise UserError(f"{path} is not a training checkpoint of this harness")
    _check_run(values, path, _PARTS)
    if not isinstance(values.get("identities"), str | list):
        raise _incomplete(path, "it has no identities")
    if not is_sharded(path) and not isinstance(values.get("optimizer"), dict):
        raise _incomplete(path, "it has no optimizer")
    return values


def _incomplete(path: Path, reason: str) -> DamagedError:
    return DamagedError(f"{path} is not a whole checkpoint: {reason}")


def _check_run(values: dict[str, Any], path: Path, parts: Iterable[str]) -> None:
    if values["format"] > FORMAT:
        raise UserError(
            f"{path} has format {values['format']}, of a newer version of this harness; this one "
            f"reads format {FORMAT}: update it"
        )
    for part in parts:
        if not isinstance(values.get(part), _PARTS[part]):
            raise _incomplete(path, f"it has no {part}")
    if not all(isinstance(k, str) and isinstance(v, dict) for k, v in values["config"].items()):
        raise _incomplete(path, "its config has other than sections")
    step, threshold, best = (values["trainer"].get(name) for name in ("step", "threshold", "best"))
    if type(step) is not int or step < 0:
        raise _incomplete(path, "its step is none")
    fine = threshold is None or isinstance(threshold, float)
    fine = fine and (best is None or (isinstance(best, dict) and {*best} == {*_BEST}))
    if not fine or (best and not all(isinstance(best[k], t) for k, t in _BEST.items())):
        raise _incomplete(path, "its threshold or best figure is none")


def newest(last: Path) -> Path:
    """``last``, or where it has been lost the newest of those that are kept beside it."""
    if exists(last):
        return last
    others = [other for suffix in ("", ".pt") for other in _others(last.with_suffix(suffix))]
    if others:
        _warn(f"checkpoint {last} is missing; going on from {others[0]}")
    return others[0] if others else last


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
) -> tuple[dict[str, Any], Path]:
    """``load(values, path)``, and what was loaded. Every process calls: what is in shards is found
    damaged here only.
    """
    while True:
        try:
            load(values, path)
            return values, path
        except DamagedError as error:
            path, values = _earlier(path, error, take)


def _earlier(path: Path, error: DamagedError, take: bool) -> tuple[Path, dict[str, Any]]:
    for other in _others(path):
        try:
            values = read_run(other)
        except UserError:
            continue
        if not take:
            step = values["trainer"]["step"]
            raise DamagedError(f"{error}; --resume {other} goes on from step {step}")
        _warn(f"{error}; going on from {other}")
        return other, values
    raise DamagedError(f"{error}; no earlier checkpoint is kept here (run.keep)") from error


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


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
    """Folders are compared by their indexes."""
    names = [p / "index.json" if p.is_dir() else p for p in (a, b)]
    return all(p.exists() for p in names) and os.path.samefile(*names)


# -- writing and keeping ----------------------------------------------------------------------


def save_atomically(values: dict[str, Any], path: Path) -> None:
    # Torch reports a full disk as a RuntimeError.
    with reported(f"cannot write checkpoint {path}", OSError, RuntimeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(values, temporary)


def save_sharded(
    values: dict[str, Any], path: Path, head: uk.PartialFC, optimizer: torch.optim.Optimizer
) -> None:
    """Writes a checkpoint as a folder; every process calls."""
    with reported(f"cannot write checkpoint {path}", OSError, ValueError):
        uk.partial_fc.save_checkpoint(path, head, optimizer, values)


def keep(last: Path, step: int, count: int, *, best: bool = False) -> None:
    """Keep ``last`` by the name of its step, and of such names the last ``count`` only; with
    ``best`` by that name, too.

    One more name is of no use for a single one. Checkpoints of later steps go too: they are of a
    course that this run has left.
    """
    with reported(f"cannot keep checkpoint {last}"):
        if count > 1:
            _name(last, f"step-{step:06d}{last.suffix}")
        steps = _steps(last)
        passed = sorted((n for n in steps.values() if n <= step), reverse=True)
        kept = passed[:count] if count > 1 else []
        for path, number in steps.items():
            if number not in kept:
                # Out of sight first: half a folder is no checkpoint.
                hidden = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                os.rename(path, hidden)
                remove(hidden)
        if best:
            _name(last, f"best{last.suffix}")


def _name(last: Path, name: str) -> None:
    """One more name for a checkpoint; it leads to the former one until this one is complete."""
    target = last.with_name(name)
    if not last.is_dir():
        with replacing(target) as temporary:
            _link(last, temporary)
        return
    temporary = last.with_name(f".{name}.{os.getpid()}.tmp")
    remove(temporary)
    shutil.copytree(last, temporary, copy_function=_link)
    flush(temporary)
    # A folder cannot be renamed over another; readers look in this place, too.
    old = last.with_name(f".{name}.old")
    if target.exists():
        remove(old)
        os.rename(target, old)
    os.rename(temporary, target)
    remove(old)
    flush(last.parent)


def _link(source: str | Path, target: str | Path) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system without second names
        shutil.copy2(source, target)
    return str(target)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- loading ----------------------------------------------------------------------------------


def load_sharded(path: Path, head: uk.PartialFC, optimizer: torch.optim.Optimizer) -> None:
    try:
        uk.partial_fc.load_checkpoint(path, head, optimizer)
    except ValueError as error:
        # Raised on all processes, whichever of them it is of.
        damaged = uk.partial_fc.UNREADABLE in str(error)
        raise (DamagedError if damaged else UserError)(str(error)) from error


def load_backbone(
    backbone: nn.Module, values: Any, *, path: Path, config: Config, averaged: bool = False
) -> None:
    """Load backbone weights; an error names the architecture of the file and the configured one.

    Args:
        values: what the file holds, see :mod:`train.backbones.weights`.
        averaged: take averaged weights where there are any.
    """
    held = backbone.state_dict()
    backbone.load_state_dict(_fitting(held, values, path=path, config=config, averaged=averaged))


def check_backbone(values: Any, *, path: Path, config: Config, averaged: bool = False) -> None:
    """The errors of :func:`load_backbone`, without memory for the configured backbone.

    Models of timm cannot be built without it.
    """
    if not config.model.name.startswith("timm:"):
        with torch.device("meta"):
            backbone = config.model.build()
        _fitting(backbone.state_dict(), values, path=path, config=config, averaged=averaged)


def _fitting(
    expected: dict[str, Any], values: Any, *, path: Path, config: Config, averaged: bool
) -> dict[str, Any]:
    state = find_state(values, averaged=averaged)
    if state is None:
        raise UserError(f"{path} holds no backbone state dict")
    found = differences(state, expected)
    held = recognize(state) or f"another architecture ({len(state)} tensors)"
    if found and held == config.model.name:
        if found[0].startswith(("missing", "unexpected")):
            held = f"{held} with other tensors"
        else:
            own = sizes(state)
            features = own is not None and own[1] != config.model.embedding_size
            held = f"{held} of another {'embedding' if features else 'input'} size"
    if found:
        model, size = config.model.name, config.model.input_size
        raise UserError(f"{path} holds {held}, not {model} at {size} x {size}: {'; '.join(found)}")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    try:
        optimizer.load_state_dict(state)
        fits = all(
            value.shape == parameter.shape[: value.dim()]
            for parameter, values in optimizer.state.items()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        )
    except Exception as error:  # it looks at its parts one by one
        raise UserError(f"{path} holds the state of another optimizer: {error}") from error
    if not fits:
        raise UserError(f"{path} holds the state of other parameters")


def load_module(module: Any, state: dict[str, Any], *, what: str, path: Path) -> None:
    """Load the other modules of a run; they differ when the losses or the data differ."""
    try:
        module.load_state_dict(state)
    except Exception as error:  # a state may hold anything
        detail = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"{path} holds another {what}: {detail}") from error
