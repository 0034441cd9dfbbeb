"""The scores of all pairs, tile by tile, in memory that does not depend on their number."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dispatch
from ..backends.dense import dense
from ..backends.histogram import Binning, HistogramTile
from ..backends.streaming.tiles import Columns, scores

# Blocks of rows in a group, see ``scores``.
BLOCKS_KEPT = 4


@dataclass(frozen=True)
class ScoreTile:
    """Scores of rows ``start:stop`` with columns ``other:end``, valid until the next tile."""

    start: int
    stop: int
    other: int
    end: int
    cosines: Tensor


@dataclass(frozen=True)
class Share:
    """A part of the tiles, of which processes with the same features count one each.

    Attributes:
        number, of: every ``of``-th tile, from the one of this number.
        total: the sum of what all processes have counted.
    """

    number: int = 0
    of: int = 1
    total: Callable[[Tensor], Tensor] = lambda counts: counts


class Scores:
    """Float32 cosines of the rows of ``feats`` with those of ``other``.

    Every pass makes the same tiles from the same operands, so its scores are bitwise those of the
    pass before. Without ``other``: the pairs within ``feats``, each unordered pair once.

    ``index``: (N,) int64 rows of ``feats`` that take part, in this order; ``labels`` are theirs.
    ``share``: of the tiles; :meth:`count` yields the total of all shares.
    """

    def __init__(
        self,
        feats: Tensor,
        labels: Tensor,
        other: Tensor | None,
        other_labels: Tensor | None,
        backend: str,
        index: Tensor | None = None,
        share: Share | None = None,
    ) -> None:
        self.share = share or Share()
        self.engine = dispatch.score_engine(backend, feats.device, feats.dtype)
        self.feats = dense(feats)
        self.in_batch = other is None
        self.columns = self.feats if other is None else dense(other)
        self.row_index, self.column_index = index, index if other is None else None
        row_labels = dense(labels.to(torch.int64))
        column_labels = row_labels
        if other_labels is not None:
            column_labels = dense(other_labels.to(torch.int64))
        self.row_labels, self.column_labels = self.engine.prepare_labels(row_labels, column_labels)

    def tiles(self, rows: range | None = None, upper: bool = False) -> Iterator[ScoreTile]:
        """Tiles of the given rows with all columns; ``upper``: without those below the diagonal."""
        block, columns = (
            self.engine.sum_block,
            Columns(self.columns, self.column_index, len(self.column_labels)),
        )
        part = slice(0, len(self.row_labels)) if rows is None else slice(rows.start, rows.stop)
        numbers = itertools.count(-self.share.number)
        for group in scores(columns, part, block, BLOCKS_KEPT * block[0], upper):
            kept = group.rows
            unit, _ = self.engine.normalize_rows(self.feats, kept.start, kept.stop, self.row_index)
            for panel in group.panels:
                place = panel.columns
                unit_columns, _ = self.engine.normalize_rows(
                    self.columns, place.start, place.stop, self.column_index, reuse=True
                )
                for some in panel.rows:
                    if next(numbers) % self.share.of:
                        continue
                    a = unit[some.start - kept.start : some.stop - kept.start]
                    cosines = self.engine.cosines(a, unit_columns)
                    yield ScoreTile(some.start, some.stop, place.start, place.stop, cosines)

    def count(
        self,
        binning: Binning,
        slots: int | None = None,
        range_of_bin: Tensor | None = None,
        ranges: Tensor | None = None,
    ) -> Tensor:
        """(2, slots) int64 on the CPU: positive and negative pairs per bin or sub-bin."""
        device = self.feats.device
        counts = torch.zeros(2, slots or binning.slots, dtype=torch.int64, device=device)
        if range_of_bin is not None and ranges is not None:
            range_of_bin, ranges = range_of_bin.to(device), ranges.to(device)
        for tile in self.tiles(upper=self.in_batch):
            self._count_tile(tile, binning, counts, self.in_batch, range_of_bin, ranges)
        return self.share.total(counts).cpu()

    def count_rows(self, rows: range, binning: Binning) -> Tensor:
        """(rows, 2, bins + 3) int64: the pairs of each row with all columns but itself."""
        shape = (len(rows), 2, binning.slots)
        counts = torch.zeros(shape, dtype=torch.int64, device=self.feats.device)
        for tile in self.tiles(rows):
            part = counts[tile.start - rows.start : tile.stop - rows.start]
            self._count_tile(tile, binning, part, False)
        return counts

    def _count_tile(
        self,
        tile: ScoreTile,
        binning: Binning,
        counts: Tensor,
        upper: bool,
        range_of_bin: Tensor | None = None,
        ranges: Tensor | None = None,
    ) -> None:
        self.engine.histogram_tile(
            tile.cosines,
            HistogramTile(
                binning=binning,
                a_labels=self.row_labels[tile.start : tile.stop],
                b_labels=self.column_labels[tile.other : tile.end],
                diagonal=tile.start - tile.other if self.in_batch else None,
                upper=upper,
                counts=counts,
                range_of_bin=range_of_bin,
                ranges=ranges,
            ),
        )
