"""The class matrix of a sharded checkpoint in one file, or the rows of some classes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ... import validate
from ...subcenters import Dominant, keep_dominant
from . import storage
from .checkpoint import HEAD, OPTIMIZER, find_checkpoint, guarded, open_checkpoint
from .storage import Rows, Stored

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Names of dtypes in the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def export_class_weights(
    path: str | os.PathLike[str],
    file: str | os.PathLike[str],
    dominant: Dominant | None = None,
) -> None:
    """Writes (C, D) "weight", thresholds and prototypes of a checkpoint as safetensors.

    Runs in one process without a process group, with memory for a block of rows: to write a file,
    the ``safetensors`` library would need the whole matrix in memory. The file's metadata are loss,
    num_classes, embedding_size and seed.

    Args:
        path: folder that :func:`save_checkpoint` was given, or of a run of train/main.py.
        file: to write; an old one is replaced when the new one is complete.
        dominant: of :func:`dominant_centers`. Of (C, K, D) weights of several centers only those
            are written, as (C, D), with "center" (C,) and, of the samples, "kept" and "cosine"
            (N,). None: all centers are.

    Raises:
        ValueError: no checkpoint, a damaged one, or one of another number of classes or of one
            center each.
        OSError: the file cannot be written.
    """
    stored = open_checkpoint(find_checkpoint(path), path)
    shared = {
        _short(name): value
        for name, value in stored.shared["tensors"].items()
        if value.dtype in _FLOATS
    }
    sharded = {
        _short(name.removeprefix(HEAD)): name
        for name in stored.tensors
        if name.startswith(HEAD) and stored.dtype(name) in _FLOATS
    }
    if dominant is not None:
        _weights_of(stored, len(dominant.center))
        shared |= {"center": dominant.center, "kept": dominant.kept, "cosine": dominant.cosine}
    center = None if dominant is None else dominant.center
    sizes = {name: _size(stored, saved, center) for name, saved in sharded.items()}
    dtypes = {name: stored.dtype(saved) for name, saved in sharded.items()}
    sizes |= {name: value.shape for name, value in shared.items()}
    dtypes |= {name: value.dtype for name, value in shared.items()}
    target = Path(file)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(_header(sizes, dtypes, stored.shared["identity"]))
            for name in sizes:
                if name in shared:
                    out.write(_bytes(shared[name]))
                else:
                    _write_rows(out, stored, sharded[name], path, center)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _short(name: str) -> str:
    """The last name, without those of modules, which differ between losses."""
    return name.rsplit(".", 1)[-1]


def _header(
    sizes: dict[str, torch.Size], dtypes: dict[str, torch.dtype], identity: dict[str, object]
) -> bytes:
    header: dict[str, object] = {"__metadata__": {k: str(v) for k, v in identity.items()}}
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + math.prod(size) * dtypes[name].itemsize
        header[name] = {
            "dtype": _DTYPES[dtypes[name]],
            "shape": list(size),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def dominant_centers(
    path: str | os.PathLike[str], feats: Tensor, labels: Tensor, angle: float = 75.0
) -> Dominant:
    """:func:`unitsface_kernels.subcenters.keep_dominant` of a checkpoint, by blocks of its classes.

    Args:
        path: as of :func:`export_class_weights`, of a loss with several ``centers``.
        feats, labels, angle: as of ``keep_dominant``; on the CPU.

    Returns:
        What it keeps, with an empty (0, D) ``weight``.

    Raises:
        TypeError, ValueError: as of ``keep_dominant``; no checkpoint, a damaged one, or one of one
            center each.
    """
    stored = open_checkpoint(find_checkpoint(path), path)
    name = _weights_of(stored)
    size = stored.size(name)
    validate.features("feats", feats)
    validate.width("feats", feats, size[2])
    validate.labels("labels", labels, len(feats), feats)
    labels = labels.to(torch.int64)
    validate.in_range("labels", labels, -1, size[0])
    center = torch.empty(size[0], dtype=torch.int64)
    kept = torch.zeros(len(feats), dtype=torch.bool)
    cosine = torch.full((len(feats),), torch.nan)
    order = labels.argsort(stable=True)
    ordered = labels[order]
    for place, block in _blocks(stored, name, path):
        bounds = torch.tensor([place.start, place.stop])
        first, last = torch.searchsorted(ordered, bounds).tolist()
        rows = order[first:last]
        # Weights may be in half precision, features are what they are.
        found = keep_dominant(block.to(feats), feats[rows], labels[rows] - place.start, angle=angle)
        center[place], kept[rows], cosine[rows] = found.center, found.kept, found.cosine
    return Dominant(torch.empty(0, size[2]), center, kept, cosine)


@dataclass(frozen=True)
class ClassRows:
    """See :func:`read_classes`; names are those of the head's state dict.

    Attributes:
        rows: (m, ...) per-class tensors.
        shared: tensors that all classes share.
        optimizer: its state dict without what is per class; None if it was not saved.
        states: (m, ...) of the per-class tensors, by name and by the optimizer's key.
    """

    rows: dict[str, Tensor]
    shared: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    states: dict[str, dict[str, Tensor]]


def read_classes(path: str | os.PathLike[str], classes: Tensor) -> ClassRows:
    """Some classes of a checkpoint, for a head with others; without communication.

    Memory is that of the rows and of a block of the checkpoint.

    Args:
        path: as of :func:`export_class_weights`.
        classes: (m,) int64 from 0 to C - 1, in any order; on the CPU.

    Raises:
        TypeError, ValueError: ``classes`` are none of it; no checkpoint, or a damaged one.
    """
    stored = open_checkpoint(find_checkpoint(path), path)
    validate.class_index("classes", classes, torch.empty(0))
    classes = classes.to(torch.int64)
    found = ClassRows({}, stored.shared["tensors"], stored.shared["optimizer"], {})
    for saved in stored.tensors:
        size = stored.size(saved)
        validate.in_range("classes", classes, 0, size[0])
        rows = torch.empty(len(classes), *size[1:], dtype=stored.dtype(saved))
        for place, block in _blocks(stored, saved, path):
            inside = (classes >= place.start) & (classes < place.stop)
            rows[inside] = block[classes[inside] - place.start]
        if saved.startswith(HEAD):
            found.rows[saved.removeprefix(HEAD)] = rows
        else:
            name, _, key = saved.removeprefix(OPTIMIZER).rpartition(".")
            found.states.setdefault(name, {})[key] = rows
    return found


def _weights_of(stored: Stored, classes: int | None = None) -> str:
    """Name of the class weights in a checkpoint, which have several centers."""
    names = [n for n in stored.tensors if n.startswith(HEAD) and _short(n) == "weight"]
    sizes = [tuple(stored.size(name)) for name in names]
    if len(names) != 1 or len(sizes[0]) != 3:
        raise ValueError(f"the class weights have one center each, sizes {sizes}: none to drop")
    if classes is not None and sizes[0][0] != classes:
        raise ValueError(f"dominant must have a center of {sizes[0][0]} classes, got {classes}")
    return names[0]


def _size(stored: Stored, name: str, center: Tensor | None) -> torch.Size:
    size = stored.size(name)
    return size if center is None or len(size) < 3 else torch.Size([size[0], *size[2:]])


def _blocks(
    stored: Stored, name: str, path: str | os.PathLike[str]
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a tensor, block by block, with their places."""
    size, dtype = stored.size(name), stored.dtype(name)
    step = max(1, storage.BLOCK_BYTES // max(1, math.prod(size[1:]) * dtype.itemsize))
    for first in range(0, size[0], step):
        block = torch.empty(min(step, size[0] - first), *size[1:], dtype=dtype)
        wanted = {name: Rows(block, first, size[0])}
        guarded(path, partial(stored.read, wanted))
        yield slice(first, first + len(block)), block


def _write_rows(
    out: BinaryIO,
    stored: Stored,
    name: str,
    path: str | os.PathLike[str],
    center: Tensor | None,
) -> None:
    """``center``: (C,) the one of each class that is written; None: all are."""
    for place, block in _blocks(stored, name, path):
        if center is not None and block.dim() > 2:
            block = block[torch.arange(len(block)), center[place]]
        out.write(_bytes(block))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
