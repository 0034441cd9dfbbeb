"""Where encoded images lie: files, records of an archive, members of shards, or memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# No photograph of a face is larger; nothing larger is read into memory.
MAX_BYTES = 64 * 2**20


class RecordError(Exception):
    """A record that cannot be read; the message names the file and the record."""


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
        """What messages call it."""
        ...


def _open(path: str, flags: int) -> int:
    """Without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@dataclass(frozen=True)
class Files:
    """One image per file."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        try:
            with open(self.paths[index], "rb", opener=_open) as file:
                status = os.fstat(file.fileno())
                reason = None
                if not stat.S_ISREG(status.st_mode):
                    reason = "it is not a regular file"
                elif status.st_size > MAX_BYTES:
                    reason = f"it has {status.st_size} bytes, more than {MAX_BYTES}"
                if reason is not None:
                    raise RecordError(f"cannot read image {self.paths[index]}: {reason}")
                return file.read()
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = getattr(error, "strerror", None) or str(error)
            raise RecordError(f"cannot read image {self.paths[index]}: {reason}") from error

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
