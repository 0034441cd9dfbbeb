"""Where encoded images lie: files, records of an archive, members of shards, or memory."""

from __future__ import annotations

import os
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


@dataclass(frozen=True)
class Files:
    """One image per file."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        try:
            with open(self.paths[index], "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    raise RecordError(
                        f"cannot read image {self.paths[index]}: it has {size} bytes, "
                        f"more than {MAX_BYTES}"
                    )
                return file.read()
        except OSError as error:
            reason = error.strerror or str(error)
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
