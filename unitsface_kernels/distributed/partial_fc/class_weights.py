"""The class matrix of a sharded checkpoint in one file."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from . import storage
from .checkpoint import HEAD, find_checkpoint, guarded, open_checkpoint
from .storage import Rows, Stored

# Names of dtypes in the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def export_class_weights(path: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Writes (C, D) "weight", thresholds and prototypes of a checkpoint as safetensors.

    Runs in one process without a process group, with memory for a block of rows: to write a file,
    the ``safetensors`` library would need the whole matrix in memory. The file's metadata are loss,
    num_classes, embedding_size and seed.

    Args:
        path: folder that :func:`save_checkpoint` was given, or of a run of train/main.py.
        file: to write; an old one is replaced when the new one is complete.

    Raises:
        ValueError: no checkpoint, or a damaged one.
        OSError: the file cannot be written.
    """
    stored = open_checkpoint(find_checkpoint(path), path)
    shared = {
        _short(name): value
        for name, value in stored.shared["tensors"].items()
        if value.dtype in _DTYPES
    }
    sharded = {
        _short(name.removeprefix(HEAD)): name
        for name in stored.tensors
        if name.startswith(HEAD) and stored.dtype(name) in _DTYPES
    }
    sizes = {name: stored.size(saved) for name, saved in sharded.items()}
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
                    _write_rows(out, stored, sharded[name], path)
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


def _write_rows(out: BinaryIO, stored: Stored, name: str, path: str | os.PathLike[str]) -> None:
    size, dtype = stored.size(name), stored.dtype(name)
    step = max(1, storage.BLOCK_BYTES // max(1, math.prod(size[1:]) * dtype.itemsize))
    for first in range(0, size[0], step):
        block = torch.empty(min(step, size[0] - first), *size[1:], dtype=dtype)
        wanted = {name: Rows(block, first, size[0])}
        guarded(path, partial(stored.read, wanted))
        out.write(_bytes(block))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
