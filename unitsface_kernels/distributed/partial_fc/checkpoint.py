"""Checkpoints of sharded classes and their optimizer, for any number of ranks.

A checkpoint is a folder of ``torch.distributed.checkpoint``, with an index beside its metadata
(:mod:`.index`). Per-class tensors, the optimizer's included, are parts of tensors of all C
classes, each written by the rank that holds the rows; values that ranks share are written once. A
file that is damaged or of another save is refused.

A checkpoint is replaced as a whole: the new one is written to ``.NAME.new`` beside it, the old
folder is renamed to ``.NAME.old``, the new one takes its place, and the old one is removed. After a
crash at any moment a complete checkpoint is in one of two places, which :func:`load_checkpoint`
tries in order: the folder itself, and ``.NAME.old``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..agreement import agree
from ..collectives import own_rank
from . import torch_files
from .index import FORMAT, INDEX, METADATA, read_index
from .module import PartialFC
from .plain_pickle import DamagedError

if TYPE_CHECKING:
    from .storage import Rows, Stored

HEAD, OPTIMIZER = "head.", "optimizer."
UNREADABLE = "cannot read checkpoint"

T = TypeVar("T")


def save_checkpoint(
    path: str | os.PathLike[str],
    head: PartialFC,
    optimizer: Optimizer | None = None,
    extra: Any = None,
) -> None:
    """Writes a checkpoint; every rank calls, and returns when it is complete.

    Args:
        path: folder on a file system that all ranks share. A checkpoint there is replaced at the
            end, as a whole; until then it remains the one to load.
        head: the sharded classes.
        optimizer: whose parameters may include others than the head's, the same on every rank.
        extra: dicts, lists, tuples, tensors, numbers and strings that ranks share, such as the
            backbone's state dict; those of the group's first rank are written.

    Raises:
        TypeError: something else in ``extra``, on all ranks (ValueError on the others).
        ValueError: ``path`` exists and is no checkpoint.
        OSError: it could not be written; the checkpoint at ``path`` remains. A ValueError on the
            other ranks, if the first one could not replace the folder.
    """
    from . import storage

    folder = Path(path)
    first = own_rank(head.group) == 0
    new = _sibling(folder, "new")

    def prepare() -> tuple[dict[str, Rows], dict[str, Any]]:
        parts, shared = _contents(head, optimizer)
        shared["extra"] = _plain("extra", extra) if first else None
        if first:
            _clear_way(folder)
        return parts, shared

    parts, shared = _each(prepare, head)
    try:
        storage.write(new, parts, shared, head.group)
        _each(lambda: _replace(folder) if first else None, head)
    except Exception:
        if first:
            shutil.rmtree(new, ignore_errors=True)
        raise


def load_checkpoint(
    path: str | os.PathLike[str], head: PartialFC, optimizer: Optimizer | None = None
) -> Any:
    """Loads a checkpoint in place, bit for bit; every rank calls, however many saved it.

    Args:
        path: folder that :func:`save_checkpoint` was given, or of a run of train/main.py, whose
            last checkpoint is taken. No code in it is run, and checksums are compared.
        head: sharded classes with the loss, C, D and seed of the saved ones.
        optimizer: with the parameters, in the groups and order, of the saved one.

    Returns:
        ``extra`` as saved, tensors on the CPU.

    Raises:
        ValueError: on every rank: no checkpoint, a damaged one, or one of something else. Only
            if a file's contents do not agree with their checksum has the head changed by then.
    """
    folder = find_checkpoint(path)
    stored = _each(lambda: open_checkpoint(folder, path), head)
    state = head.state_dict()
    wanted: dict[str, Rows] = {}

    def check() -> None:
        _check_head(path, stored, head, state)
        wanted.update({HEAD + name: _rows(head, state[name]) for name in head.per_class})
        if optimizer is not None:
            _check_groups(path, stored, optimizer)
            wanted.update(_optimizer_rows(stored, head, optimizer))

    _each(check, head)
    _each(lambda: guarded(path, lambda: stored.read(wanted)), head)
    _each(lambda: guarded(path, lambda: _take(stored, wanted, state, head, optimizer)), head)
    return stored.shared["extra"]


def _check_head(
    path: str | os.PathLike[str], stored: Stored, head: PartialFC, state: dict[str, Any]
) -> None:
    """Identity, and names and sizes of tensors."""
    identity = stored.shared["identity"]
    for name, value in head.identity().items():
        if identity.get(name) != value:
            raise ValueError(
                f"checkpoint {path} has {name} = {identity.get(name)}, this PartialFC has {value}"
            )
    own: dict[str, object] = {name: tuple(value.shape) for name, value in _tensors(state).items()}
    for name in head.per_class:
        own[name] = (head.num_classes, *state[name].shape[1:])
    saved = _saved_sizes(stored)
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"checkpoint {path} was made with other options of the loss: it has {name} = "
                f"{saved.get(name)}, this PartialFC has {own.get(name)}"
            )


def _check_groups(path: str | os.PathLike[str], stored: Stored, optimizer: Optimizer) -> None:
    """Numbers of parameters per group."""
    saved = stored.shared["optimizer"]
    if saved is None:
        raise ValueError(f"checkpoint {path} has no optimizer state")
    groups, own = (
        [len(group["params"]) for group in of] for of in (saved["param_groups"], _groups(optimizer))
    )
    if groups != own:
        raise ValueError(
            f"the optimizer in checkpoint {path} has groups of {groups} parameters, this one has "
            f"groups of {own}"
        )


def _take(
    stored: Stored,
    wanted: dict[str, Rows],
    state: dict[str, Any],
    head: PartialFC,
    optimizer: Optimizer | None,
) -> None:
    """Loads everything beside the head's rows, which were read in place."""
    state.update(stored.shared["tensors"])
    state["_extra_state"] = {**head.get_extra_state(), "step": stored.shared["step"]}
    head.load_state_dict(state)
    if optimizer is not None:
        saved = stored.shared["optimizer"]
        for index, name in _per_class_parameters(head, optimizer):
            prefix = f"{OPTIMIZER}{name}."
            own = {k[len(prefix) :]: v.tensor for k, v in wanted.items() if k.startswith(prefix)}
            if own:
                saved["state"].setdefault(index, {}).update(own)
        optimizer.load_state_dict(saved)


def read_extra(path: str | os.PathLike[str]) -> Any:
    """``extra`` of a checkpoint, tensors on the CPU; without a head, and without communication.

    Raises:
        ValueError: no checkpoint, or a damaged one.
    """
    return open_checkpoint(find_checkpoint(path), path).shared["extra"]


def find_checkpoint(path: str | os.PathLike[str]) -> Path | None:
    """The folder to read: ``path``, or the old one if a replacement was interrupted; for a run's
    folder, its last checkpoint.
    """
    for folder in (Path(path), Path(path) / "checkpoints" / "last"):
        for candidate in (folder, _sibling(folder, "old")):
            if is_checkpoint(candidate):
                return candidate
    return None


def is_checkpoint(folder: Path) -> bool:
    """True for the folder of a checkpoint, damaged or not."""
    return (folder / INDEX).is_file() or (folder / METADATA).is_file()


def open_checkpoint(folder: Path | None, path: str | os.PathLike[str]) -> Stored:
    """Opens the folder that ``find_checkpoint(path)`` returned."""
    from . import storage

    if folder is None:
        raise ValueError(f"no such checkpoint: {path}")
    return guarded(path, lambda: storage.Stored(folder))


def read_saved(path: str | os.PathLike[str], *, unknown: bool = False) -> Any:
    """Reads a file of ``torch.save``: tensors, on the CPU, and plain values.

    Differs from ``torch.load(path, map_location="cpu", weights_only=True)`` in three points:
    checksums are compared, memory is bounded by the size of the file, and parameters are returned
    as tensors.

    Args:
        path: the file.
        unknown: dicts of their items stand in for objects of other types, such as callbacks in a
            checkpoint of Lightning, where they are refused otherwise. Nothing of them is executed.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or holds something else.
    """
    try:
        return torch_files.read_file(path, unknown=unknown)
    except DamagedError as error:
        raise _unreadable(path, error) from error


def guarded(path: str | os.PathLike[str], read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # damaged files raise errors of any kind
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return ValueError(f"{UNREADABLE} {path}: {reason[:400]}")


def _each(work: Callable[[], T], head: PartialFC) -> T:
    """The result of ``work``; an error on one rank is an error on all."""
    (result,), _ = agree(lambda: ((work(),), 0, {}), head.group)
    return result


# -- what is in a checkpoint ----------------------------------------------------------------------


def _contents(
    head: PartialFC, optimizer: Optimizer | None
) -> tuple[dict[str, Rows], dict[str, Any]]:
    state = head.state_dict()
    parts = {HEAD + name: _rows(head, state[name]) for name in sorted(head.per_class)}
    tensors = _tensors(state)
    shared: dict[str, Any] = {
        "format": FORMAT,
        "identity": head.identity(),
        "step": head.step,
        "tensors": _plain("head", {n: t for n, t in tensors.items() if n not in head.per_class}),
        "optimizer": None,
    }
    if optimizer is not None:
        saved = optimizer.state_dict()
        saved["state"] = {index: dict(values) for index, values in saved["state"].items()}
        for index, name in _per_class_parameters(head, optimizer):
            values = saved["state"].get(index, {})
            for key in [k for k, v in values.items() if _like(v, state[name])]:
                parts[f"{OPTIMIZER}{name}.{key}"] = _rows(head, values.pop(key))
        shared["optimizer"] = _plain("the optimizer's state", saved)
    return parts, shared


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _rows(head: PartialFC, tensor: Tensor) -> Rows:
    from .storage import Rows

    return Rows(tensor.detach(), head.shard.start, head.num_classes)


def _like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return optimizer.param_groups


def _per_class_parameters(head: PartialFC, optimizer: Optimizer) -> Iterator[tuple[int, str]]:
    """Places in the optimizer's state dict, and names."""
    names = {id(p): name for name, p in head.named_parameters() if name in head.per_class}
    parameters = [p for group in _groups(optimizer) for p in group["params"]]
    for index, parameter in enumerate(parameters):
        if id(parameter) in names:
            yield index, names[id(parameter)]


def _saved_sizes(stored: Stored) -> dict[str, object]:
    sizes: dict[str, object] = {
        name: tuple(value.shape) for name, value in stored.shared["tensors"].items()
    }
    for name in stored.tensors:
        if name.startswith(HEAD):
            sizes[name.removeprefix(HEAD)] = tuple(stored.size(name))
    return sizes


def _optimizer_rows(stored: Stored, head: PartialFC, optimizer: Optimizer) -> dict[str, Rows]:
    """Memory for the states of this rank's rows in the checkpoint."""
    found = {}
    parameters = dict(head.named_parameters())
    for _, name in _per_class_parameters(head, optimizer):
        for saved in stored.tensors:
            if saved.startswith(f"{OPTIMIZER}{name}."):
                memory = torch.empty_like(parameters[name], dtype=stored.dtype(saved))
                found[saved] = _rows(head, memory)
    return found


def _plain(name: str, value: Any) -> Any:
    """A copy without subclasses, graphs and devices, for readers that run no code."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # A view would be written with its whole storage, an expanded tensor without its copies.
        whole = value.nbytes == value.untyped_storage().nbytes()
        return value if whole else value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {_plain(f"keys of {name}", k): _plain(name, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(name, v) for v in value]
        return items if isinstance(value, list) else tuple(items)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):  # NumPy has subclasses of them
            return kind(value)
    if value is not None:
        raise TypeError(
            f"{name} must consist of dicts, lists, tuples, tensors, numbers and strings, got "
            f"{type(value).__name__}"
        )
    return None


# -- the folder -----------------------------------------------------------------------------------


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _clear_way(folder: Path) -> None:
    """Removes leftovers; ``folder`` keeps the last complete checkpoint, if any."""
    old = _sibling(folder, "old")
    if not folder.exists() and is_checkpoint(old):
        os.rename(old, folder)
    if folder.exists() and not (
        folder.is_dir() and (is_checkpoint(folder) or not any(folder.iterdir()))
    ):
        raise ValueError(f"{folder} exists and is no checkpoint: it will not be replaced")
    for leftover in (old, _sibling(folder, "new")):
        if leftover.exists():
            shutil.rmtree(leftover)
    folder.parent.mkdir(parents=True, exist_ok=True)


def _replace(folder: Path) -> None:
    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    try:
        read_index(new)
    except (OSError, DamagedError) as error:
        raise OSError(f"{folder} must be a folder that all ranks see: {error}") from error
    _flush_folder(new)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    _flush_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    """Writes names of files to the disk, so that a rename cannot precede them."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
