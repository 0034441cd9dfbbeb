"""Every order in which tiles are visited: those of the losses, and that of the metrics.

A tile compares a block of rows with a block of columns. Drivers process a tile, this
file selects the next one: the schedule of a loss is one function. The order is also that in which
partial results are added up, so another one changes the last bits of losses and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .other_ranks import Blocks


class Tile(NamedTuple):
    """Places of the rows and of the columns that are compared."""

    rows: slice
    columns: slice

    @property
    def symmetric(self) -> bool:
        """Whether, in a batch, the columns are the rows: the tile is its own mirror image."""
        return self.rows.start == self.columns.start

    @property
    def diagonal(self) -> int:
        """In a batch, pair (i, i + diagonal) of the tile is a sample with itself."""
        return self.rows.start - self.columns.start


@dataclass(frozen=True)
class Columns:
    """``count`` columns of a comparison, of ``centers`` rows each of ``source``, or of
    ``source[index]``.
    """

    source: Tensor
    index: Tensor | None
    count: int
    centers: int = 1


@dataclass(frozen=True)
class Panel:
    """A block of columns, which is normalized once, and the blocks of rows that meet it.

    Attributes:
        columns: place among all columns.
        rows: in the order of the visit.
        source, part, index: where the columns come from: rows ``part`` of :class:`Columns`.
    """

    columns: slice
    rows: list[slice]
    source: Tensor
    part: slice
    index: Tensor | None

    @property
    def tiles(self) -> list[Tile]:
        return [Tile(rows, self.columns) for rows in self.rows]


class RowGroup(NamedTuple):
    """Rows whose unit vectors are kept while the columns pass by."""

    rows: slice
    panels: list[Panel]


def blocks(start: int, stop: int, size: int) -> list[slice]:
    """``start:stop`` in blocks of ``size``, the last of which may be smaller."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def in_batch(
    count: int, block: int, reaches: Callable[[Tile], bool] | None = None
) -> Iterator[Tile]:
    """A batch with itself: on and above the diagonal, row by row.

    Args:
        count: rows of the batch.
        block: rows and columns of a tile.
        reaches: whether a tile takes part; the first one of a row that does not ends the row.
    """
    for rows in blocks(0, count, block):
        for columns in blocks(rows.start, count, block):
            tile = Tile(rows, columns)
            if reaches is not None and not reaches(tile):
                break
            yield tile


def against_columns(
    columns: Columns,
    count: int,
    block: tuple[int, int],
    left_out: Callable[[slice], list[bool]] | None = None,
) -> list[Panel]:
    """Rows against a memory or classes: column by column, each against all rows.

    Args:
        columns: of all panels.
        count: number of rows.
        block: rows and columns of a tile.
        left_out: for a block of rows, which of the panels do without it; None: all have all rows.
    """
    row_blocks = blocks(0, count, block[0])
    parts = blocks(0, columns.count, block[1])
    rows = [row_blocks] * len(parts)
    if left_out is not None:
        skipped = [left_out(block) for block in row_blocks]
        rows = [
            [block for block, skips in zip(row_blocks, skipped, strict=True) if not skips[number]]
            for number in range(len(parts))
        ]
    each = columns.centers
    return [
        Panel(part, some, columns.source, slice(each * part.start, each * part.stop), columns.index)
        for part, some in zip(parts, rows, strict=True)
    ]


def against_ranks(
    remote: Blocks, count: int, block: tuple[int, int], wanted: Tensor | None = None
) -> Iterator[Panel]:
    """Own rows against those of other ranks, in the order in which they arrive.

    Args:
        remote: the rows of other ranks.
        count: number of own rows.
        block: rows and columns of a tile.
        wanted: (T,) bool of the rows of all ranks; the others are left out, and places are among
            these. Waits for the device.
    """
    for place, features in remote:
        index, before, size = None, place.start, features.shape[0]
        if wanted is not None:
            index = torch.nonzero(wanted[place]).flatten()
            before, size = int(wanted[: place.start].sum()), len(index)
        for panel in against_columns(Columns(features, index, size), count, block):
            yield replace(panel, columns=shifted(panel.columns, before))


def scores(
    columns: Columns, rows: slice, block: tuple[int, int], kept: int, upper: bool
) -> Iterator[RowGroup]:
    """The pairs that the metrics count, each tile once.

    Args:
        columns: of all tiles.
        rows: that take part.
        block: rows and columns of a tile.
        kept: rows of a group. Its columns are normalized again for every group: less than a
            hundredth of the time of the GEMMs, and no copy of N x D.
        upper: rows and columns are the same; tiles below the diagonal are left out.
    """
    for group in blocks(rows.start, rows.stop, kept):
        panels = []
        for part in blocks(group.start if upper else 0, columns.count, block[1]):
            stop = min(group.stop, part.stop) if upper else group.stop
            some = blocks(group.start, stop, block[0])
            panels.append(Panel(part, some, columns.source, part, columns.index))
        yield RowGroup(group, panels)


def shifted(place: slice, by: int) -> slice:
    return slice(place.start + by, place.stop + by)
