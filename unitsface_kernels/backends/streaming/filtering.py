"""Gradient filtering: tiles that the gradients may leave out within ``skip_tolerance``.

The mass of row i in a tile is the sum over its pairs of |d loss_i / d cosine|, in units of the
largest value that one pair can have. Tiles are left out only as long as the masses left out of a
row add up to at most the tolerance, whatever the number of columns. docs/math.md derives what
that bounds. With library GEMMs the host decides, and waits for the device; where an engine has a
``device_filter`` the device does, row by row, and nothing waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .engine import Engine
from .selection import RowSelection


def heavy_rows(masses: Tensor, tolerance: float) -> Tensor:
    """Indices of rows whose total mass exceeds the tolerance; the others need no gradient tile.

    In a batch that a model has learned, the others are most rows. A NaN mass exceeds it. Waits
    for the device.
    """
    return torch.nonzero(~(masses.sum(dim=0, dtype=torch.float64) <= tolerance)).flatten()


def negligible(masses: Tensor, tolerance: float) -> list[bool]:
    """For each tile, whether to leave it out. Tiles of the smallest masses go first.

    Args:
        masses: (tiles, N), NaN where unknown.

    Waits for the device: the result decides which GEMMs are launched.
    """
    order = masses.amax(dim=1).argsort()
    left_out = masses[order].to(torch.float64).cumsum(0)
    # Masses are nonnegative and the sums monotone: the tiles within the tolerance are a prefix.
    fits = (left_out <= tolerance).all(dim=1)
    skipped = torch.zeros_like(fits)
    skipped[order] = fits
    return skipped.tolist()


def needed_rows(masses: Tensor, tolerance: float) -> Tensor:
    """For each tile, which rows need it; (tiles, N) bool.

    The device's part of :func:`heavy_rows` and :func:`negligible`: no result has a shape of its
    own, and every row has a choice of its own, its smallest masses first.

    Args:
        masses: (tiles, N), NaN where unknown.
    """
    ordered, order = masses.to(torch.float64).sort(dim=0)
    # NaN comes last, and its sum is not within the tolerance either.
    needed = ~(ordered.cumsum(0) <= tolerance)
    return torch.empty_like(needed).scatter_(0, order, needed)


def selections(needed: Tensor) -> list[RowSelection]:
    """Rows (k, n) bool of k tiles, in their order; no host sync."""
    # Each has 16 bytes, to which kernels want pointers aligned.
    number = needed.new_zeros((needed.shape[0], 4), dtype=torch.int32)
    number[:, 0] = needed.sum(dim=1)
    places = needed.logical_not().to(torch.uint8).argsort(dim=1, stable=True).to(torch.int32)
    return [RowSelection(*both) for both in zip(places, number, strict=True)]


def add_to_rows(
    engine: Engine, total: Tensor, tile: Tensor, columns: Tensor, selection: RowSelection | None
) -> None:
    """``total += tile @ columns``, of the selected rows."""
    if selection is None:
        engine.addmm(total, tile, columns)
    else:
        assert engine.device_filter is not None
        engine.device_filter.add_rows(total, tile, columns, selection)


def add_to_columns(
    engine: Engine,
    total: Tensor | None,
    tile: Tensor,
    rows: Tensor,
    selection: RowSelection | None,
) -> Tensor:
    """``tile.T @ rows`` over the selected rows; added to ``total``, if there is one."""
    if selection is not None:
        assert engine.device_filter is not None
        return engine.device_filter.columns(tile, rows, selection, total)
    if total is None:
        return engine.matmul(tile.T, rows)
    engine.addmm(total, tile.T, rows)
    return total


def add_to_both(
    engine: Engine,
    tile: Tensor,
    a: Tensor,
    b: Tensor,
    d_a: Tensor | None,
    d_b: Tensor | None,
    need_b: bool,
    selections: tuple[RowSelection | None, RowSelection | None] = (None, None),
) -> Tensor | None:
    """``d_a += tile @ b`` unless it is None, and :func:`add_to_columns` to ``d_b`` if needed, of
    the rows that are selected for each.
    """
    for_a, for_b = selections
    if d_a is not None and need_b and for_a is None and for_b is None:
        return engine.both_products(tile, a, b, d_a, d_b)
    if d_a is not None:
        add_to_rows(engine, d_a, tile, b, for_a)
    return add_to_columns(engine, d_b, tile, a, for_b) if need_b else None


class RowFilter:
    """Gradient filter of a ``sum`` loss: adds up the mass left out of each row, tile by tile."""

    def __init__(self, call: Call, engine: Engine, weights: Tensor | None) -> None:
        self._engine = engine
        self._left_out = call.rows.new_zeros(call.rows.shape[0], dtype=torch.float64)
        limit = call.skip_tolerance * call.spec.slope_bound(call.params)
        self._limit = limit if weights is None else limit * weights.abs().amax()

    def skips_tile(self, tile: Tensor, rows: slice, columns: slice) -> bool:
        """Whether to leave out an in-batch gradient tile; if so, its mass is added to the rows'.

        Args:
            tile: (n, m) as :meth:`Engine.sum_tile` returns it.
            rows, columns: the rows of the batch on both sides.

        Waits for the device.
        """
        by_rows = self._left_out[rows] + self._engine.absolute_sums(tile, dim=1)
        by_columns = self._left_out[columns] + self._engine.absolute_sums(tile, dim=0)
        fits = (by_rows <= self._limit).all() & (by_columns <= self._limit).all()
        if not bool(fits):
            return False
        self._left_out[rows] = by_rows
        self._left_out[columns] = by_columns
        return True

    def fits(self, tile: Tensor, rows: slice) -> Tensor:
        """(n,) bool: rows of a tile that are left out, the device's choice. Their masses are added.

        Args:
            tile, rows: as of :meth:`skips_tile`; of an in-batch tile, what the rows get of it.
        """
        left_out = self._left_out[rows] + self._engine.absolute_sums(tile, dim=1)
        fits = left_out <= self._limit
        self._left_out[rows] = torch.where(fits, left_out, self._left_out[rows])
        return fits

    def needs_columns(self, tile: Tensor, columns: slice) -> RowSelection:
        """All rows of an in-batch tile, or none, if its columns do without it; by the device."""
        left_out = self._left_out[columns] + self._engine.absolute_sums(tile, dim=0)
        fits = (left_out <= self._limit).all()
        self._left_out[columns] = torch.where(fits, left_out, self._left_out[columns])
        number = torch.where(fits, 0, tile.shape[0]).to(torch.int32)
        return RowSelection(None, number)

    def rows_to_keep(self, tile: Tensor, rows: slice) -> Tensor | None:
        """Indices of a tile's rows whose gradients are needed; the others are left out.

        None: all rows. Too few could be left out to make a copy of the rest worth it.
        """
        left_out = self._left_out[rows] + self._engine.absolute_sums(tile, dim=1)
        fits = left_out <= self._limit
        kept = torch.nonzero(~fits).flatten()
        if worth_taking(len(kept), len(fits)):
            self._left_out[rows] = torch.where(fits, left_out, self._left_out[rows])
            return kept
        return None


def worth_taking(kept: int, count: int) -> bool:
    """Whether GEMMs over the kept rows save more time than copying these rows takes."""
    return 10 * kept <= 9 * count


# Rows with more positives than this keep them in their tiles.
MOST_POSITIVES = 4


class Positives:
    """A few positives per row, handled outside the tiles: their mass would keep every tile.

    Attributes:
        places: (K, N) positions among the columns, below 0: none.
        slopes: (K, N) d loss / d cosine of positives whose row is left out of the tile, else 0.
    """

    def __init__(self, call: Call, on_device: bool) -> None:
        self.places = _positives(call, on_device)
        self.slopes = self.places.new_zeros(self.places.shape, dtype=torch.float32)

    def selection(
        self, row_filter: RowFilter, engine: Engine, tile: Tensor, rows: slice, start: int
    ) -> RowSelection:
        """The rows to keep, selected on the device."""
        every, width = torch.arange(tile.shape[0], device=tile.device), tile.shape[1]
        found = []
        for places, slopes in zip(self.places[:, rows], self.slopes[:, rows], strict=True):
            position = places - start
            inside = (position >= 0) & (position < width)
            entries = (every, position.clamp(0, width - 1))
            stored = tile[entries]
            found.append((slopes, inside, entries, stored, engine.entries(tile, *entries)))
            tile[entries] = torch.where(inside, 0.0, stored)
        fits = row_filter.fits(tile, rows)
        for slopes, inside, entries, stored, values in found:
            slopes.copy_(torch.where(inside & fits, values, slopes))
            # Not in rows that are left out, which nothing reads. Beside the tile there is no entry.
            tile[entries] = torch.where(inside, stored, tile[entries])
        return selections(~fits[None])[0]

    def rows_to_keep(
        self, row_filter: RowFilter, engine: Engine, tile: Tensor, rows: slice, start: int
    ) -> Tensor | None:
        """As :meth:`RowFilter.rows_to_keep`; stores the slopes of positives in rows left out."""
        found = []
        for places, slopes in zip(self.places[:, rows], self.slopes[:, rows], strict=True):
            position = places - start
            row = torch.nonzero((position >= 0) & (position < tile.shape[1])).flatten()
            entries = (row, position[row])
            found.append((slopes, entries, tile[entries], engine.entries(tile, *entries)))
        for _, entries, _, _ in found:
            tile[entries] = 0.0
        kept = row_filter.rows_to_keep(tile, rows)
        left_out = torch.zeros(tile.shape[0], dtype=torch.bool, device=tile.device)
        if kept is not None:
            left_out = left_out.logical_not_().index_fill_(0, kept, False)
        for slopes, entries, stored, values in found:
            outside = left_out[entries[0]]
            slopes[entries[0]] = torch.where(outside, values, slopes[entries[0]])
            tile[entries] = torch.where(outside, 0.0, stored)
        return kept


def _positives(call: Call, on_device: bool) -> Tensor:
    """(K, N) positions of each row's positives; too many are none: of that row, if K is not to
    depend on data ``on_device``, else of all.
    """
    labels = call.row_labels
    if call.spec.topology == "class":
        return labels[None]
    assert call.column_labels is not None
    ordered, order = call.column_labels.sort(stable=True)
    first = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - first
    count = count.masked_fill(labels < 0, 0)
    if on_device:
        most = min(MOST_POSITIVES, len(order))
        count = count.masked_fill(count > most, 0)
    else:
        most = int(count.amax()) if len(count) else 0
        if most > MOST_POSITIVES:
            most = 0
    each = torch.arange(most, device=labels.device)[:, None]
    taken = (first + each).clamp(max=max(len(order) - 1, 0))
    return (
        torch.where(each < count, order[taken], -1) if most else labels.new_zeros((0, len(labels)))
    )
