"""Text files of test protocols: lines with their numbers, and names that stay in their folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError
from train.small_files import load_npy, reading_text

_MOST_NAME = 4096  # characters, as file systems allow


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """``("<path>, line <n>", line)`` of every line that is not blank, stripped."""
    with reading_text(path), open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if stripped := line.strip():
                yield f"{path}, line {number}", stripped


def inside(name: str, where: str) -> str:
    """``name`` if it is a relative path that stays below the folder it is meant for."""
    parts = name.split("/")
    good = name.isprintable() and not name.startswith("/") and "\\" not in name
    if not good or ".." in parts or not parts[-1] or len(name) > _MOST_NAME:
        raise UserError(f"{where}: expected a path within the folder, got {name[:80]!r}")
    return name


def integers(path: Path, columns: str) -> NDArray[np.int64]:
    """Lines of integers, (lines, columns): numpy's reader, as there may be many millions.

    ``columns`` are the names of the columns, for messages.
    """
    width = len(columns.split())
    try:
        table = np.loadtxt(path, dtype=np.int64, comments=None, ndmin=2)
        if table.size and table.shape[1] == width:
            return table
    except (OSError, ValueError):
        pass  # the slow way below names the line
    for where, line in lines(path):
        whole_numbers(where, line.split(), columns)
    raise UserError(f"{path}: no lines of {columns}")


def whole_numbers(where: str, words: list[str], columns: str) -> list[int]:
    """The words of a line as integers of 64 bits."""
    count = len(columns.split())
    try:
        values = [int(np.int64(word)) for word in words[: count + 1]]
    except (ValueError, OverflowError):
        values = []
    if len(values) != count:
        raise UserError(f"{where}: expected integers {columns}, got {' '.join(words[:80])[:80]!r}")
    return values


def read_matrix(path: Path, *, rows: int) -> NDArray[np.float32]:
    """A .npy file of (rows, D) floats."""
    matrix = load_npy(path)
    if matrix.ndim != 2 or len(matrix) != rows or not np.issubdtype(matrix.dtype, np.floating):
        raise UserError(
            f"{path}: expected {rows} rows of floats, got {matrix.shape} of {matrix.dtype}"
        )
    with np.errstate(over="ignore"):  # of float64; reported where features are not finite
        return np.ascontiguousarray(matrix, dtype=np.float32)
