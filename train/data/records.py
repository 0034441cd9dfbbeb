"""Storage of encoded images: files, records of an archive, members of shards, or memory."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from train.errors import reported

# No photograph of a face is larger; nothing larger is read into memory.
MAX_BYTES = 64 * 2**20
# Far below the usual limit of 1024 per process, and above any number of shards in one batch.
MOST_OPEN = 128


class RecordError(Exception):
    """A record that cannot be read; the message names the file and the record."""


def _reading(what: str) -> AbstractContextManager[None]:
    # ValueError: a name that no file can have.
    return reported(f"cannot read {what}", OSError, ValueError, error=RecordError)


class Records(Protocol):
    """Encoded images by index. Reads are independent, so that worker processes share them."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            RecordError: if it cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """The image's name in messages."""
        ...


def _open(path: str, flags: int) -> int:
    """Opens a file without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@dataclass(frozen=True)
class Files:
    """One image per file."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        path = self.paths[index]
        with _reading(f"image {path}"), open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            if status.st_size > MAX_BYTES:
                raise ValueError(f"it has {status.st_size} bytes, more than {MAX_BYTES}")
            return file.read()

    def name(self, index: int) -> str:
        return self.paths[index]


@dataclass(frozen=True)
class Encoded:
    """Encoded images in memory; ``source`` is the file they came from."""

    images: Sequence[bytes]
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"{self.source}, image {index}"


class OpenFiles:
    """Bytes of large files at any offset; a file is opened when first read and kept open.

    Reads name their offset, so that worker processes may share what was open before they were
    forked. A pickled copy opens the files anew. Not for several threads.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self._open: OrderedDict[int, int] = OrderedDict()
        self.bytes_read = 0

    def read(self, index: int, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer at the end of the file.

        Raises:
            RecordError: if the file cannot be read.
        """
        with _reading(self.paths[index]):
            data = os.pread(self._descriptor(index), length, offset)
        self.bytes_read += len(data)
        return data

    def size(self, index: int) -> int:
        with _reading(self.paths[index]):
            return os.fstat(self._descriptor(index)).st_size

    def _descriptor(self, index: int) -> int:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        if len(self._open) >= MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[index] = os.open(self.paths[index], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[index]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict(), "bytes_read": 0}
