"""Bytes of large files at any offset."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from train.data.records import RecordError

# Far below the usual limit of 1024 per process, and above any number of shards in one batch.
MOST_OPEN = 128


class OpenFiles:
    """Files by index, opened when first read and kept open.

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
        try:
            data = os.pread(self._descriptor(index), length, offset)
        except OSError as error:
            reason = error.strerror or str(error)
            raise RecordError(f"cannot read {self.paths[index]}: {reason}") from error
        self.bytes_read += len(data)
        return data

    def size(self, index: int) -> int:
        try:
            return os.fstat(self._descriptor(index)).st_size
        except OSError as error:
            reason = error.strerror or str(error)
            raise RecordError(f"cannot read {self.paths[index]}: {reason}") from error

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
