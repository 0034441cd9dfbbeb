"""Gradient filtering: tiles that the gradients may leave out within ``skip_tolerance``.

The mass of row i in a tile is the sum over its pairs of |d loss_i / d cosine|, in units of the
largest value that one pair can have. Tiles are left out only as long as the masses left out of a
row add up to at most the tolerance, whatever the number of columns. docs/math.md derives what
that bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .engine import Engine


def heavy_rows(masses: Tensor, tolerance: float) -> Tensor:
    """Which rows have more mass in all their tiles together; the others need no tile at all.

    In a batch that a model has learned, the others are most rows. NaN is heavy. Waits for the
    device.
    """
    return torch.nonzero(~(masses.sum(dim=0, dtype=torch.float64) <= tolerance)).flatten()


def negligible(masses: Tensor, tolerance: float) -> list[bool]:
    """Which of the tiles to leave out, the lightest first.

    Args:
        masses: (tiles, N), NaN where nothing is known.

    Waits for the device: which GEMMs to launch is decided here.
    """
    order = masses.amax(dim=1).argsort()
    spent = masses[order].to(torch.float64).cumsum(0)
    # Sums of nonnegative terms grow, so what fits is a beginning of the order.
    fits = (spent <= tolerance).all(dim=1)
    skipped = torch.zeros_like(fits)
    skipped[order] = fits
    return skipped.tolist()


class Budget:
    """What the rows of a ``sum`` loss may still leave out; each tile is decided on at once."""

    def __init__(self, call: Call, engine: Engine, weights: Tensor | None) -> None:
        self._engine = engine
        self._spent = call.rows.new_zeros(call.rows.shape[0], dtype=torch.float64)
        limit = call.skip_tolerance * call.spec.slope_bound(call.params)
        self._limit = limit if weights is None else limit * weights.abs().amax()

    def covers(self, tile: Tensor, rows: slice, columns: slice) -> bool:
        """Whether an in-batch gradient tile can be left out; if so, it is paid for.

        Args:
            tile: (n, m) as :meth:`Engine.sum_tile` returns it.
            rows, columns: the rows of the batch on both sides.

        Waits for the device.
        """
        by_rows = self._spent[rows] + self._engine.absolute_sums(tile, dim=1)
        by_columns = self._spent[columns] + self._engine.absolute_sums(tile, dim=0)
        fits = (by_rows <= self._limit).all() & (by_columns <= self._limit).all()
        if not bool(fits):
            return False
        self._spent[rows] = by_rows
        self._spent[columns] = by_columns
        return True

    def unpaid(self, tile: Tensor, rows: slice) -> Tensor | None:
        """Rows of a tile against columns that are still wanted; the others have paid.

        None: all, and no row has paid: too few could for a copy of the rest to be worth it.
        """
        spent = self._spent[rows] + self._engine.absolute_sums(tile, dim=1)
        pays = spent <= self._limit
        wanted = torch.nonzero(~pays).flatten()
        if worth_taking(len(wanted), len(pays)):
            self._spent[rows] = torch.where(pays, spent, self._spent[rows])
            return wanted
        return None


def worth_taking(wanted: int, count: int) -> bool:
    """Whether GEMMs with fewer rows save more than it takes to copy those rows together."""
    return 10 * wanted <= 9 * count


# Rows with more positives than this keep them in their tiles.
MOST_POSITIVES = 4


class Positives:
    """A few positives per row, taken out of the tiles, which could not be left out with them.

    Attributes:
        places: (K, N) positions among the columns, below 0: none.
        slopes: (K, N) d loss / d cosine of those that were left out of their tiles, else 0.
    """

    def __init__(self, call: Call) -> None:
        self.places = _positives(call)
        self.slopes = self.places.new_zeros(self.places.shape, dtype=torch.float32)

    def unpaid(
        self, budget: Budget, engine: Engine, tile: Tensor, rows: slice, start: int
    ) -> Tensor | None:
        """As :meth:`Budget.unpaid`; the slopes of positives whose rows have paid are kept."""
        found = []
        for places, slopes in zip(self.places[:, rows], self.slopes[:, rows], strict=True):
            position = places - start
            row = torch.nonzero((position >= 0) & (position < tile.shape[1])).flatten()
            entries = (row, position[row])
            found.append((slopes, entries, tile[entries], engine.entries(tile, *entries)))
        for _, entries, _, _ in found:
            tile[entries] = 0.0
        wanted = budget.unpaid(tile, rows)
        paid = torch.zeros(tile.shape[0], dtype=torch.bool, device=tile.device)
        if wanted is not None:
            paid = paid.logical_not_().index_fill_(0, wanted, False)
        for slopes, entries, stored, values in found:
            of_paid = paid[entries[0]]
            slopes[entries[0]] = torch.where(of_paid, values, slopes[entries[0]])
            tile[entries] = torch.where(of_paid, 0.0, stored)
        return wanted


def _positives(call: Call) -> Tensor:
    """(K, N) positions of each row's positives, K = 0 if some row has too many."""
    labels = call.row_labels
    if call.spec.topology == "class":
        return labels[None]
    assert call.column_labels is not None
    ordered, order = call.column_labels.sort(stable=True)
    first = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - first
    count = count.masked_fill(labels < 0, 0)
    most = int(count.amax()) if len(count) else 0
    if most > MOST_POSITIVES:
        most = 0
    each = torch.arange(most, device=labels.device)[:, None]
    taken = (first + each).clamp(max=max(len(order) - 1, 0))
    return (
        torch.where(each < count, order[taken], -1) if most else labels.new_zeros((0, len(labels)))
    )
