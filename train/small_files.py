"""Files of a run: written whole or not at all; JSON and NumPy arrays are read within memory of
their size, with errors in one line.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError, reported

# By how much a member of an archive may be larger than its compressed bytes; deflate reaches 1000.
_MOST_EXPANDED = 20


class ArrayError(Exception):
    """The reason why there is no array."""


def flush(path: Path) -> None:
    """Force the contents of a file, or the names in a folder, to the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, renamed over it at the end: a reader gets the old file or
    the new one, and after an error the old one is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def reading_text(path: Path) -> Iterator[None]:
    with reported(f"{path}: not a text file", UnicodeDecodeError), reported(f"cannot read {path}"):
        yield


def read_text(path: Path) -> str:
    with reading_text(path):
        return path.read_text(encoding="utf-8")


def parse_json(text: str, where: Path | str) -> Any:
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deeply" if deep else error
        raise UserError(f"{where}: not JSON: {reason}") from error


def read_npy(file: BinaryIO, size: int) -> NDArray[Any]:
    """The array of a .npy file of ``size`` bytes; objects, which would be unpickled, are refused.

    NumPy's own reader allocates what the header claims, and raises whatever Python's parser does.

    Raises:
        ArrayError: if it is damaged, or claims more than there is.
        OSError: if it cannot be read.
    """
    try:
        major, _ = np.lib.format.read_magic(file)
        parse = np.lib.format.read_array_header_1_0
        if major > 1:
            parse = np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = parse(file)
    except OSError:
        raise
    except Exception as error:  # of Python's parser and tokenizer, and numpy's of data types
        reason = str(error)[:200] or type(error).__name__
        raise ArrayError(f"not a .npy file, or damaged: {reason}") from error
    if dtype.hasobject or any(n < 0 for n in shape) or len(shape) > 32:
        raise ArrayError(f"expected numbers, got {str(shape)[:80]} of {dtype}")
    wanted, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if wanted > there:
        raise ArrayError(f"expected {wanted} bytes of numbers, it has {there}")
    data = bytearray(wanted)
    file.readinto(data)  # type: ignore[attr-defined]
    return np.frombuffer(data, dtype).reshape(shape, order="F" if columns_first else "C")


def load_npy(path: Path) -> NDArray[Any]:
    with reported(path, ArrayError), reported(f"cannot read {path}"), open(path, "rb") as file:
        return read_npy(file, os.fstat(file.fileno()).st_size)


def load_npz(path: Path, *names: str) -> list[NDArray[Any]]:
    """Arrays of these names, in their order."""
    found = []
    # zipfile raises many kinds for damaged archives.
    failed = reported(f"{path}: cannot read {', '.join(names)}", Exception)
    with failed, zipfile.ZipFile(path) as archive:
        for name in names:
            member = archive.getinfo(f"{name}.npy")
            if member.file_size > _MOST_EXPANDED * member.compress_size + 4096:
                raise ArrayError(f"{name} is {member.file_size} bytes when unpacked")
            with archive.open(member) as file:
                found.append(read_npy(file, member.file_size))  # type: ignore[arg-type]
    return found
