"""Checkpoints: written whole or not at all, read without unpickling code.

A run with whole class weights has a file, one with shards a folder of all processes' parts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unitsface_kernels as uk
from train.backbones import build_backbone
from train.backbones.weights import differences, find_state, recognize
from train.config import Config
from train.errors import UserError

LAST = Path("checkpoints") / "last.pt"
LAST_SHARDED = Path("checkpoints") / "last"
FORMAT = 1
# The parts of a run's file; a folder of shards has the optimizer's elsewhere.
_PARTS = {"config": dict, "trainer": dict, "backbone": dict, "loss": dict, "scaler": dict}
_BEST = {"figure": str, "value": int | float, "step": int}


class DamagedError(UserError):
    """A checkpoint that cannot be read; an earlier one may be."""


def save_atomically(values: dict[str, Any], path: Path) -> None:
    """Write beside ``path``, then rename over it: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write checkpoint {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Path) -> Any:
    try:
        return uk.partial_fc.read_saved(path)
    except FileNotFoundError as error:
        raise UserError(f"no such checkpoint: {path}") from error
    except OSError as error:
        raise DamagedError(f"cannot read checkpoint {path}: {error.strerror}") from error
    except ValueError as error:
        raise DamagedError(str(error)) from error


def save_sharded(
    values: dict[str, Any], path: Path, head: uk.PartialFC, optimizer: torch.optim.Optimizer
) -> None:
    """The same for a folder; every process calls."""
    try:
        uk.partial_fc.save_checkpoint(path, head, optimizer, values)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write checkpoint {path}: {error}") from error


def load_sharded(path: Path, head: uk.PartialFC, optimizer: torch.optim.Optimizer) -> None:
    try:
        uk.partial_fc.load_checkpoint(path, head, optimizer)
    except ValueError as error:
        # Of one process or of another, which all of them are told.
        damaged = uk.partial_fc.UNREADABLE in str(error)
        raise (DamagedError if damaged else UserError)(str(error)) from error


def last(run_dir: Path) -> Path:
    """Where a run's last checkpoint is, or would be."""
    sharded = run_dir / LAST_SHARDED
    return sharded if is_sharded(sharded) else run_dir / LAST


def found(path: Path) -> Path:
    """A checkpoint as given, or the last one of a run's folder or its folder of checkpoints."""
    if not path.is_dir() or (path / LAST.parent).is_dir():
        return last(path) if path.is_dir() else path
    if path.name == LAST.parent.name:
        return last(path.parent)
    return path if uk.partial_fc.is_checkpoint(path) else last(path)


def exists(path: Path) -> bool:
    return path.is_file() or is_sharded(path)


def is_sharded(path: Path) -> bool:
    # Where there is no folder, one that was about to be replaced may be beside it.
    return path.is_dir() or path.with_name(f".{path.name}.old").is_dir()


def read_any(path: Path) -> tuple[Path, Any]:
    """What a file holds, a folder of shards, or the last checkpoint of a run folder; and which."""
    path = found(path)
    values = _read_shared(path) if is_sharded(path) else read(path)
    if is_run(values):
        _check_run(values, path, ("config", "trainer"))
    return path, values


def _read_shared(path: Path) -> Any:
    try:
        return uk.partial_fc.read_extra(path)
    except ValueError as error:
        raise DamagedError(str(error)) from error


def is_run(values: Any) -> bool:
    return isinstance(values, dict) and type(values.get("format")) is int and "trainer" in values


def read_run(path: Path) -> dict[str, Any]:
    """A checkpoint of this harness, for resuming; without what is in shards."""
    sharded = is_sharded(path)
    values = _read_shared(path) if sharded else read(path)
    if not is_run(values):
        raise UserError(f"{path} is not a training checkpoint of this harness")
    _check_run(values, path, _PARTS)
    if not isinstance(values.get("identities"), str | list):
        raise DamagedError(f"{path} is not a whole checkpoint: it has no identities")
    if not sharded and not isinstance(values.get("optimizer"), dict):
        raise DamagedError(f"{path} is not a whole checkpoint: it has no optimizer")
    return values


def _check_run(values: dict[str, Any], path: Path, parts: Iterable[str]) -> None:
    if values["format"] > FORMAT:
        raise UserError(
            f"{path} has format {values['format']}, of a newer version of this harness; this one "
            f"reads format {FORMAT}: update it"
        )
    for part in parts:
        if not isinstance(values.get(part), _PARTS[part]):
            raise DamagedError(f"{path} is not a whole checkpoint: it has no {part}")
    if not all(isinstance(k, str) and isinstance(v, dict) for k, v in values["config"].items()):
        raise DamagedError(f"{path} is not a whole checkpoint: its config has other than sections")
    trainer = values["trainer"]
    step, threshold, best = (trainer.get(name) for name in ("step", "threshold", "best"))
    if type(step) is not int or step < 0:
        raise DamagedError(f"{path} is not a whole checkpoint: its step is none")
    fine = threshold is None or isinstance(threshold, float)
    fine = fine and (best is None or (isinstance(best, dict) and {*best} == {*_BEST}))
    if not fine or (best and not all(isinstance(best[k], t) for k, t in _BEST.items())):
        raise DamagedError(
            f"{path} is not a whole checkpoint: its threshold or best figure is none"
        )


def pack_names(names: Sequence[str]) -> str:
    """Names of folders hold no zeros. Two million strings would take 10 s to load, one none."""
    return "\0".join(names)


def check_names(held: str | list[str], names: Sequence[str], path: Path) -> None:
    """An error unless the identities are those a checkpoint holds; earlier ones hold a list."""
    held = held.split("\0") if isinstance(held, str) else held
    wrong = next((i for i, (a, b) in enumerate(zip_longest(held, names)) if a != b), None)
    if wrong is None:
        return
    shown = [repr(given[wrong]) if wrong < len(given) else "none" for given in (held, names)]
    raise UserError(
        f"{path} was trained on other identities ({len(held)}) than those of data.path "
        f"({len(names)}); of number {wrong} the names are {shown[0]} and {shown[1]}"
    )


def architecture(config: Config) -> str:
    return f"{config.model.name} at {config.model.input_size} x {config.model.input_size}"


def load_backbone(
    backbone: nn.Module, values: Any, *, path: Path, config: Config, averaged: bool = False
) -> None:
    """Load backbone weights, or say which architecture the file holds and which was asked for.

    Args:
        values: what the file holds, see :mod:`train.backbones.weights`.
        averaged: take averaged weights where there are any.
    """
    held = backbone.state_dict()
    backbone.load_state_dict(_fitting(held, values, path=path, config=config, averaged=averaged))


def check_backbone(values: Any, *, path: Path, config: Config, averaged: bool = False) -> None:
    """The errors of :func:`load_backbone`, without memory for what the configuration asks for.

    Models of timm cannot be built without it.
    """
    model = config.model
    if not model.name.startswith("timm:"):
        with torch.device("meta"):
            backbone = build_backbone(
                model.name, model.input_size, model.dropout, model.embedding_size, model.options
            )
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
            features = any(f.startswith(("features.", "bn5.")) for f in found)
            held = f"{held} of another {'embedding' if features else 'input'} size"
    if found:
        raise UserError(f"{path} holds {held}, not {architecture(config)}: {'; '.join(found)}")
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
