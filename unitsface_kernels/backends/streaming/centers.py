"""Classes of several centers: the cosine with a class is the largest of those with its centers.

A tile of m classes of K centers each has products (n, m K) with the centers, those of a class side
by side. Their maxima are the cosines (n, m) that formulas read. The gradient of a cosine is that of
the product that attains it, of equal ones the first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .engine import ClassTile, SumTile


class Largest(NamedTuple):
    """The largest ``cosine`` (n, m) float32 with each class of a tile, and ``which`` center attains
    it, (n, m) uint8. NaN is larger than every number.
    """

    cosine: Tensor
    which: Tensor


def in_memory(memory: Tensor, width: int) -> Largest:
    """Where those of ``width`` classes lie in the (n, m K) float32 of their products, K > 1."""
    flat, size = memory.view(-1), len(memory) * width
    which = flat[size:].view(torch.uint8)[:size]
    return Largest(flat[:size].view(-1, width), which.view(-1, width))


class CenterTiles:
    """Tiles of classes for an engine that multiplies them into memory."""

    #: K, :attr:`Call.centers`.
    centers: int = 1
    #: Result of the last tile.
    _largest: Largest

    def cosines(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, D), (m, D) -> (n, m) float32 cosines, in ``out`` or valid until the next ones."""
        raise NotImplementedError

    def _workspace(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that the next workspace of this name may overwrite."""
        raise NotImplementedError

    def columns_per_tile(self, block: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a tile that has at most the products of ``block``."""
        return block if self.centers == 1 else (block[0], max(block[1] // self.centers, 1))

    def _columns(self, tile: SumTile | ClassTile, kept: Tensor | None = None) -> Tensor:
        """(n, m) cosines with the columns of a tile; ``kept``: where they stay for another pass."""
        if self.centers == 1:
            return self.cosines(tile.a, tile.b, kept)
        products = self.cosines(tile.a, tile.b)
        if kept is None:
            n, m = len(tile.a), len(tile.b) // self.centers
            which = self._workspace("which", n, m, dtype=torch.uint8)
            self._largest = Largest(self._workspace("largest", n, m), which)
        else:
            self._largest = in_memory(kept, len(tile.b) // self.centers)
        self._take_largest(products, self._largest)
        return self._largest.cosine

    def _kept(self, cosines: Tensor) -> Tensor:
        """The cosines that a first pass left."""
        if self.centers == 1:
            return cosines
        self._largest = in_memory(cosines, cosines.shape[1] // self.centers)
        return self._largest.cosine

    def _of_vectors(self, gradient: Tensor) -> Tensor:
        """The gradient (n, m) of the last tile's cosines as that of its products."""
        if self.centers == 1:
            return gradient
        n, m = gradient.shape
        # The products are not needed any more.
        name = "cosines" if gradient.dtype == torch.float32 else "spread"
        out = self._workspace(name, n, m * self.centers, dtype=gradient.dtype)
        self._spread(gradient, self._largest.which, out)
        return out

    def _take_largest(self, products: Tensor, out: Largest) -> None:
        """The largest of products (n, m K), by operations of Torch."""
        values, which = products.view(*out.cosine.shape, self.centers).max(dim=2)
        out.cosine.copy_(values)
        out.which.copy_(which)

    def _spread(self, gradient: Tensor, which: Tensor, out: Tensor) -> None:
        """(n, m) to its places in (n, m K), likewise."""
        places = out.view(*gradient.shape, self.centers).zero_()
        places.scatter_(2, which.to(torch.int64).unsqueeze(2), gradient.unsqueeze(2))
