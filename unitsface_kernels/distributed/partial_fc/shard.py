"""The classes of a rank, and their initial rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Classes whose initial rows come from one generator.
_BLOCK = 4096


@dataclass(frozen=True)
class Shard:
    """Consecutive classes ``start:stop`` of ``num_classes``."""

    num_classes: int
    start: int
    stop: int

    @classmethod
    def of_rank(cls, num_classes: int, rank: int, ranks: int) -> Shard:
        """C // W classes each, one more for the first C % W ranks."""
        each, more = divmod(num_classes, ranks)
        start = rank * each + min(rank, more)
        return cls(num_classes, start, start + each + (rank < more))

    def __len__(self) -> int:
        return self.stop - self.start

    def local(self, labels: Tensor) -> Tensor:
        """(N,) int64 classes as rows of the shard; -1 stays ignored, -2: in another shard."""
        if len(self) == self.num_classes:
            # Labels out of range, whose error comes later on CUDA, meet no column.
            return labels
        here = (labels >= self.start) & (labels < self.stop)
        elsewhere = torch.where(labels == -1, -1, -2)
        return torch.where(here, labels - self.start, elsewhere)

    def normal_rows(self, width: int, name: str, seed: int) -> Iterator[tuple[slice, Tensor]]:
        """Standard normal rows (m, width) of the shard, block by block, with their places.

        A class's numbers depend on the class, ``name`` and ``seed`` alone, not on the ranks.
        """
        for first in range(self.start - self.start % _BLOCK, self.stop, _BLOCK):
            size = min(_BLOCK, self.num_classes - first)
            key = zlib.crc32(f"{seed} {name} {first}".encode())
            generator = torch.Generator().manual_seed(seed << 32 ^ key)
            block = torch.randn(size, width, generator=generator)
            begin, end = max(first, self.start), min(first + size, self.stop)
            yield slice(begin - self.start, end - self.start), block[begin - first : end - first]
