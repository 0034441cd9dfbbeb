"""Files of unit features: .npy with a .csv of names beside it, or .parquet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError, reported
from train.small_files import replacing

COLUMNS = ("name", "identity", "norm")
# Names of files may be no text.
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@dataclass(frozen=True)
class Vectors:
    """Rows of one file. ``norms`` are the lengths of features as the backbone gave them, which
    several losses train to measure the quality of an image.
    """

    features: NDArray[np.float32]  # (N, D) of length 1
    names: Sequence[str]
    identities: Sequence[str]
    norms: Sequence[float]

    @classmethod
    def of(
        cls, features: NDArray[np.float32], names: Sequence[str], identities: Sequence[str]
    ) -> Vectors:
        """Rows with these features, of any length."""
        norms = np.linalg.norm(features, axis=1)
        unit = features / np.maximum(norms, 1e-12)[:, None]
        return cls(unit, names, identities, norms.tolist())

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, index: Sequence[int]) -> Vectors:
        columns = ([c[i] for i in index] for c in (self.names, self.identities, self.norms))
        return Vectors(np.asarray(self.features[index]), *columns)

    def blocks(self, size: int) -> Iterator[Vectors]:
        for start in range(0, len(self), size):
            yield self.rows(range(start, min(start + size, len(self))))


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A table to write, which appears whole at the end."""
    with replacing(path) as temporary, open(temporary, "w", **_TEXT) as file:
        yield file


def check_name(path: Path, *endings: str) -> None:
    """A file that can be written here, before anything is embedded."""
    if path.suffix not in endings:
        raise UserError(f"expected a file {' or '.join(endings)}, got {path}")
    if path.suffix == ".parquet":
        _parquet(path)
    table = path.with_suffix(".csv")
    if path.suffix == ".npy" and table.exists() and not path.exists():
        raise UserError(f"{path}: its names belong in {table}, which is there without it")


@contextmanager
def writing(path: Path) -> Iterator[Callable[[Vectors], None]]:
    """A function that appends rows; the file, and the table beside it, appear at the end."""
    with reported(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with (_write_parquet if path.suffix == ".parquet" else _write_npy)(path) as add:
            yield add


@contextmanager
def _write_npy(path: Path) -> Iterator[Callable[[Vectors], None]]:
    with (
        open_text(path.with_suffix(".csv")) as text,
        replacing(path) as numbers,
        open(numbers, "wb") as file,
    ):
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        head: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (0, 0)}
        # Of one length whatever the number of rows, which is known at the end.
        np.lib.format.write_array_header_1_0(file, head)

        def add(part: Vectors) -> None:
            head["shape"] = head["shape"][0] + len(part), part.features.shape[1]
            file.write(np.ascontiguousarray(part.features, dtype="<f4").data)
            writer.writerows(zip(part.names, part.identities, part.norms, strict=True))

        yield add
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, head)


def _parquet(path: Path) -> Any:
    needed = f"{path} needs pyarrow: pip install pyarrow, or name a .npy file"
    with reported(needed, ImportError):
        import pyarrow.parquet
    return pyarrow


@contextmanager
def _write_parquet(path: Path) -> Iterator[Callable[[Vectors], None]]:
    arrow = _parquet(path)
    with replacing(path) as temporary:
        writers: list[Any] = []

        def add(part: Vectors) -> None:
            flat = arrow.array(np.ascontiguousarray(part.features).reshape(-1))
            features = arrow.FixedSizeListArray.from_arrays(flat, part.features.shape[1])
            columns = [list(part.names), list(part.identities), list(part.norms)]
            table = arrow.table([*columns, features], names=[*COLUMNS, "features"])
            if not writers:
                writers.append(arrow.parquet.ParquetWriter(temporary, table.schema))
            writers[0].write_table(table)

        try:
            yield add
        finally:
            for writer in writers:
                writer.close()


def read(path: Path) -> Vectors:
    """What :func:`writing` has written, or any .npy of unit rows with such a table beside it.

    Features stay on the disk until they are used.
    """
    try:
        # Copied on write: Torch takes no array that cannot be written.
        features = np.load(path, mmap_mode="c", allow_pickle=False)
        with open(path.with_suffix(".csv"), **_TEXT) as file:
            table = [(r["name"], r["identity"], float(r["norm"])) for r in csv.DictReader(file)]
    except OSError as error:
        where = error.filename or path
        raise UserError(f"cannot read {where}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, EOFError, csv.Error) as error:
        raise UserError(f"{path}: no features with a table beside them: {error}") from error
    shape, dtype = features.shape, features.dtype
    if len(shape) != 2 or shape[0] != len(table) or dtype != np.float32 or 0 in shape:
        raise UserError(f"{path}: expected {len(table)} rows of float32, got {shape} of {dtype}")
    return Vectors(features, *([row[i] for row in table] for i in range(3)))
