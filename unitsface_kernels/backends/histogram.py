"""Counting the scores of a tile: the arguments, and the reference in Torch operations.

A score is the float32 cosine of a pair. Where it is counted is a monotone function of it, the same
in ``csrc/include/unitsface/histogram_bin.h`` and here, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .reference import normalize_rows

INT32_MAX = 2**31 - 1


def score_key(score: Tensor) -> Tensor:
    """Float32 values as int64: monotone, neighbors one apart, -0 and 0 the same."""
    bits = score.contiguous().view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits, -(bits & INT32_MAX))


def score_of_key(key: Tensor) -> Tensor:
    """The inverse of :func:`score_key`."""
    size = key.abs().to(torch.int32).view(torch.float32)
    return torch.where(key >= 0, size, -size)


@dataclass(frozen=True)
class Binning:
    """Bins of equal width over [low, high), and what lies outside.

    The bin of a score c: 0 below ``low``, ``bins`` + 1 from ``high`` on, ``bins`` + 2 NaN, else
    1 + floor((c - low) * scale) in float32 arithmetic.
    """

    bins: int
    low: float = -1.0
    high: float = 1.0

    @property
    def slots(self) -> int:
        return self.bins + 3

    @cached_property
    def scale(self) -> float:
        return float(torch.tensor(self.bins / (self.high - self.low), dtype=torch.float32))

    def bin_of(self, score: Tensor) -> Tensor:
        """(...) float32 to (...) int64."""
        position = (score - self.low) * self.scale
        inside = position.nan_to_num().clamp(0, self.bins).to(torch.int64)
        bins = torch.where(score < self.low, 0, 1 + inside)
        return torch.where(score.isnan(), self.bins + 2, bins)

    @cached_property
    def edge_keys(self) -> Tensor:
        """(bins + 1,) keys of the smallest score of each bin from 1 on, by bisection.

        The edges as the kernels round them: a score is at least the edge of a bin if and only if
        it is counted in that bin or above.
        """
        wanted = torch.arange(1, self.bins + 2)
        below = score_key(torch.full((self.bins + 1,), -torch.inf))
        above = score_key(torch.full((self.bins + 1,), torch.inf))
        while bool((above - below > 1).any()):
            middle = torch.div(below + above, 2, rounding_mode="floor")
            reached = self.bin_of(score_of_key(middle)) >= wanted
            below, above = below.where(reached, middle), middle.where(reached, above)
        return above


@dataclass
class HistogramTile:
    """Counting arguments of a tile of n x m scores.

    Attributes:
        a_labels, b_labels: (n,), (m,) identities as the engine prepared them; below 0: ignored.
        diagonal: the pair (i, i + diagonal) of the tile is left out; None: no pair is.
        upper: only pairs (i, j) with j > i + diagonal.
        counts: (2, slots) int64, positives first, added to; (n, 2, slots): row by row.
        range_of_bin: (bins + 3,) int32 range in a bin, -1: none. None: bins are counted.
        ranges: (R, 4) int64: key of the lowest score, number of float32 values, binary logarithm
            of how many of them share a counter, and first counter.
    """

    binning: Binning
    a_labels: Tensor
    b_labels: Tensor
    diagonal: int | None
    upper: bool
    counts: Tensor
    range_of_bin: Tensor | None = None
    ranges: Tensor | None = None


class ScoreEngine(Protocol):
    """The work of a backend on one tile of the metrics; see ``streaming.Engine``."""

    @property
    def sum_block(self) -> tuple[int, int]:
        """Rows and columns of a tile; equal."""

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    def normalize_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor | None]: ...

    def cosines(self, a: Tensor, b: Tensor) -> Tensor:
        """(n, m) float32 cosines of unit rows, valid until the next ones; may be overwritten."""

    def histogram_tile(self, cosines: Tensor, tile: HistogramTile) -> None:
        """Adds a tile's scores to ``tile.counts``."""


class ReferenceScores:
    """Unit rows, cosines and histograms in Torch operations, on any device."""

    #: Rows and columns of a tile.
    sum_block = (1024, 1024)

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare_labels(
        self, row_labels: Tensor, column_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert column_labels is not None
        return row_labels, column_labels

    def normalize_rows(
        self,
        source: Tensor,
        start: int,
        stop: int,
        index: Tensor | None = None,
        reuse: bool = False,
    ) -> tuple[Tensor, None]:
        rows = source[start:stop] if index is None else source[index[start:stop]]
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return normalize_rows(wide), None

    def cosines(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return (a @ b.T).to(torch.float32)

    def histogram_tile(self, cosines: Tensor, tile: HistogramTile) -> None:
        n, m = cosines.shape
        counted = (tile.a_labels >= 0)[:, None] & (tile.b_labels >= 0)[None, :]
        if tile.diagonal is not None:
            place = torch.arange(m, device=cosines.device)[None, :] - tile.diagonal
            row = torch.arange(n, device=cosines.device)[:, None]
            counted &= place > row if tile.upper else place != row
        i, j = counted.nonzero(as_tuple=True)
        score, negative = cosines[i, j], tile.a_labels[i] != tile.b_labels[j]
        slot = tile.binning.bin_of(score)
        if tile.range_of_bin is not None:
            assert tile.ranges is not None
            which = tile.range_of_bin[slot].to(torch.int64)
            low, size, shift, first = tile.ranges[which.clamp(min=0)].unbind(1)
            offset = score_key(score) - low
            kept = (which >= 0) & (offset >= 0) & (offset < size)
            slot = first + (offset >> shift)
            i, slot, negative = i[kept], slot[kept], negative[kept]
        slots = tile.counts.shape[-1]
        histogram = i if tile.counts.dim() == 3 else torch.zeros_like(i)
        counter = (2 * histogram + negative.to(torch.int64)) * slots + slot
        tile.counts += torch.bincount(counter, minlength=tile.counts.numel()).view_as(tile.counts)
