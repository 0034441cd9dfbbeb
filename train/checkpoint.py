"""Checkpoints: written whole or not at all, read without unpickling code.

A run with whole class weights has a file, one with shards a folder of all processes' parts.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unitsface_kernels as uk
from train.backbones.weights import differences, find_state, recognise
from train.config import Config
from train.errors import UserError

LAST = Path("checkpoints") / "last.pt"
LAST_SHARDED = Path("checkpoints") / "last"
FORMAT = 1
# What torch.load raises for damaged files.
_DAMAGED = (
    OSError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
)


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
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"no such checkpoint: {path}") from error
    except _DAMAGED as error:
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else "empty file"
        raise UserError(f"cannot read checkpoint {path}: {reason}") from error


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
        raise UserError(str(error)) from error


def last(run_dir: Path) -> Path:
    """Where a run's last checkpoint is, or would be."""
    sharded = run_dir / LAST_SHARDED
    return sharded if is_sharded(sharded) else run_dir / LAST


def exists(path: Path) -> bool:
    return path.is_file() or is_sharded(path)


def is_sharded(path: Path) -> bool:
    # Where there is no folder, one that was about to be replaced may be beside it.
    return path.is_dir() or path.with_name(f".{path.name}.old").is_dir()


def read_any(path: Path) -> tuple[Path, Any]:
    """What a file holds, a folder of shards, or the last checkpoint of a run folder; and which."""
    if (path / LAST.parent).is_dir():
        path = last(path)
    return path, read_run(path) if is_sharded(path) else read(path)


def is_run(values: Any) -> bool:
    return isinstance(values, dict) and values.get("format") == FORMAT and "trainer" in values


def read_run(path: Path) -> dict[str, Any]:
    """A checkpoint of this harness, for resuming; without what is in shards."""
    if is_sharded(path):
        try:
            values = uk.partial_fc.read_extra(path)
        except ValueError as error:
            raise UserError(str(error)) from error
    else:
        values = read(path)
    if not is_run(values):
        raise UserError(f"{path} is not a training checkpoint of this harness")
    return values


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
    state = find_state(values, averaged=averaged)
    if state is None:
        raise UserError(f"{path} holds no backbone state dict")
    found = differences(state, backbone.state_dict())
    held = recognise(state) or f"another architecture ({len(state)} tensors)"
    if found and held == config.model.name:
        if found[0].startswith(("missing", "unexpected")):
            held = f"{held} with other tensors"
        else:
            features = any(f.startswith(("features.", "bn5.")) for f in found)
            held = f"{held} of another {'embedding' if features else 'input'} size"
    if found:
        raise UserError(f"{path} holds {held}, not {architecture(config)}: {'; '.join(found)}")
    backbone.load_state_dict(state)


def load_module(module: nn.Module, state: dict[str, Any], *, what: str, path: Path) -> None:
    """Load the other modules of a run; they differ when the losses or the data differ."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} holds another {what}: {detail}") from error
