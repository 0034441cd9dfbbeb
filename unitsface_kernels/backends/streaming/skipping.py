"""Which tiles the gradients may do without: ``skip_tolerance``.

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


def negligible(masses: Tensor, tolerance: float) -> list[bool]:
    """Which of the tiles to leave out, the lightest first.

    Args:
        masses: (tiles, N), NaN where nothing is known.

    Waits for the device: which products to launch is decided here.
    """
    order = masses.amax(dim=1).argsort()
    spent = masses[order].to(torch.float64).cumsum(0)
    # Sums of nonnegative terms grow, so what fits is a beginning of the order.
    fits = (spent <= tolerance).all(dim=1)
    skipped = torch.zeros_like(fits)
    skipped[order] = fits
    return skipped.tolist()


class Budget:
    """What the rows of a ``sum`` loss have left: tiles come one by one and are judged at once."""

    def __init__(self, call: Call, engine: Engine, weights: Tensor | None) -> None:
        self._engine = engine
        self._spent = call.rows.new_zeros(call.rows.shape[0], dtype=torch.float64)
        limit = call.skip_tolerance * call.spec.slope_bound(call.params)
        self._limit = limit if weights is None else limit * weights.abs().amax()

    def covers(self, tile: Tensor, rows: slice, columns: slice | None) -> bool:
        """Whether the gradient tile can be left out; if so, it is paid for.

        Args:
            tile: (n, m) as :meth:`Engine.sum_tile` returns it.
            rows, columns: the rows of the batch on both sides; None: columns are no rows.

        Waits for the device.
        """
        by_rows = self._spent[rows] + self._engine.absolute_sums(tile, dim=1)
        fits = (by_rows <= self._limit).all()
        by_columns = None
        if columns is not None:
            by_columns = self._spent[columns] + self._engine.absolute_sums(tile, dim=0)
            fits &= (by_columns <= self._limit).all()
        if not bool(fits):
            return False
        self._spent[rows] = by_rows
        if by_columns is not None:
            self._spent[columns] = by_columns
        return True
