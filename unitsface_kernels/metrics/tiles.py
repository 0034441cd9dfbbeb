"""The scores of all pairs, tile by tile, in memory that does not depend on their number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dispatch
from ..backends.dense import dense
from ..backends.histogram import Binning, HistogramTile, ReferenceScores, ScoreEngine
from ..backends.native import loader, score_engine
from ..validate import choice

BACKENDS = ("native", "reference")
# Blocks of rows whose unit vectors are kept while the columns pass by. Columns are normalized again
# for every such group: less than a hundredth of the time of the products, and no copy of N x D.
BLOCKS_KEPT = 4


def resolve(backend: str, device: dispatch.Device, dtype: torch.dtype) -> str:
    """As :func:`unitsface_kernels.dispatch.resolve`, among the backends that have histograms.

    ``UNITSFACE_BACKEND`` overrides "auto" if it names one of them; "triton" does not.
    """
    choice("backend", backend, ("auto", *BACKENDS))
    if backend == "auto":
        wanted = os.environ.get("UNITSFACE_BACKEND", "auto")
        backend = wanted if wanted in BACKENDS else _fastest(device, dtype)
    return dispatch.resolve(backend, device, dtype)


def _fastest(device: dispatch.Device, dtype: torch.dtype) -> str:
    reason = dispatch.unavailable("native", device, dtype)
    if reason is None:
        return "native"
    if dispatch.meant_for_kernels(device, dtype):
        loader.warn_of_fallback(f"native: {reason}")
    return "reference"


@dataclass(frozen=True)
class Tile:
    """Scores of rows ``start:stop`` with columns ``other:end``, valid until the next tile."""

    start: int
    stop: int
    other: int
    end: int
    cosines: Tensor

    @property
    def skip(self) -> int:
        """Pair (i, i + skip) is a sample with itself, if rows and columns are the same."""
        return self.start - self.other


class Scores:
    """Float32 cosines of the rows of ``feats`` with those of ``other``.

    Every pass makes the same tiles from the same operands, so its scores are bitwise those of the
    pass before. Without ``other``: the pairs within ``feats``, each unordered pair once.

    ``index``: (N,) int64 rows of ``feats`` that take part, in this order; ``labels`` are theirs.
    """

    def __init__(
        self,
        feats: Tensor,
        labels: Tensor,
        other: Tensor | None,
        other_labels: Tensor | None,
        backend: str,
        index: Tensor | None = None,
    ) -> None:
        name = resolve(backend, feats.device, feats.dtype)
        device = feats.device
        self.engine: ScoreEngine = (
            score_engine(device) if name == "native" else ReferenceScores(device)
        )
        self.feats = dense(feats)
        self.in_batch = other is None
        self.columns = self.feats if other is None else dense(other)
        self.row_index, self.column_index = index, index if other is None else None
        row_labels = dense(labels.to(torch.int64))
        column_labels = row_labels
        if other_labels is not None:
            column_labels = dense(other_labels.to(torch.int64))
        self.row_labels, self.column_labels = self.engine.prepare_labels(row_labels, column_labels)

    def tiles(self, rows: range | None = None, upper: bool = False) -> Iterator[Tile]:
        """Tiles of the given rows with all columns; ``upper``: without those below the diagonal."""
        block, width = self.engine.sum_block
        rows = range(len(self.row_labels)) if rows is None else rows
        count = len(self.column_labels)
        for kept in range(rows.start, rows.stop, BLOCKS_KEPT * block):
            kept_end = min(kept + BLOCKS_KEPT * block, rows.stop)
            unit, _ = self.engine.normalize_rows(self.feats, kept, kept_end, self.row_index)
            for other in range(kept if upper else 0, count, width):
                end = min(other + width, count)
                columns, _ = self.engine.normalize_rows(
                    self.columns, other, end, self.column_index, reuse=True
                )
                for start in range(kept, min(kept_end, end) if upper else kept_end, block):
                    stop = min(start + block, kept_end)
                    cosines = self.engine.cosines(unit[start - kept : stop - kept], columns)
                    yield Tile(start, stop, other, end, cosines)

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
        return counts.cpu()

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
        tile: Tile,
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
                skip=tile.skip if self.in_batch else None,
                upper=upper,
                counts=counts,
                range_of_bin=range_of_bin,
                ranges=ranges,
            ),
        )
