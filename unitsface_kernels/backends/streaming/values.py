"""Values of a formula's variables, of a call and of a tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import LossSpec
from ...policy.variable import SIDES
from .call import Call


class TileVariables(NamedTuple):
    """Variables of a formula as a tile's pairs read them; or their gradients, to be added to.

    Pair (i, j) reads ``a_rows`` at i and ``b_columns`` at j; in the other direction ``b_rows`` at j
    and ``a_columns`` at i. In a gradient these two have the share of the other direction.

    Attributes:
        scalars: (S,).
        a_rows: (R, n), part of (R, N).
        b_columns: (C, m), part of (C, M).
        b_rows: (R, m); None: the tile has one direction.
        a_columns: (C, n); None likewise.
    """

    scalars: Tensor
    a_rows: Tensor
    b_columns: Tensor
    b_rows: Tensor | None = None
    a_columns: Tensor | None = None


class Variables(NamedTuple):
    """Values, in float32, or gradients of all variables of a call, in the order of the spec.

    Attributes:
        scalars: (S,).
        rows: (R, N), the given ones first; in a batch across ranks (R, T) of all ranks' rows.
        columns: (C, M).
    """

    scalars: Tensor
    rows: Tensor
    columns: Tensor

    def tile(self, rows: slice, columns: slice, own: int = 0, both: bool = False) -> TileVariables:
        """The variables of a tile.

        Args:
            rows, columns: places among the rows of the call and among all columns.
            own: place of the rows of the call among those of all ranks, which are the columns.
            both: rows and columns are of the same kind, and the tile has the other direction too.
        """
        place = slice(rows.start + own, rows.stop + own)
        return TileVariables(
            self.scalars,
            self.rows[:, place],
            self.columns[:, columns],
            self.rows[:, columns] if both else None,
            self.columns[:, place] if both else None,
        )

    def by_row(self, rows: slice, columns: slice) -> TileVariables:
        """Gradients of a tile, those of scalars by row."""
        return TileVariables(self.scalars[:, rows], self.rows[:, rows], self.columns[:, columns])

    def of_rows(self, call: Call) -> list[Tensor]:
        """What a row's own formula reads: () of scalars and (N,) of the call's rows."""
        return [*self.scalars, *self.rows[:, own_rows(call)]]

    def at(self, rows: Tensor | None, columns: Tensor) -> Variables:
        """The variables at some places; ``rows``: None for all."""
        of_rows = self.rows if rows is None else self.rows.index_select(1, rows)
        return Variables(self.scalars, of_rows, self.columns.index_select(1, columns))

    def times(self, factor: Tensor | None) -> Variables:
        """Gradients times a factor (), if there is one."""
        return self if factor is None else Variables(*(value * factor for value in self))

    def streamed(self, spec: LossSpec) -> Variables | None:
        """The variables that tiles read; None: there are none."""
        if not any(variable.streamed for variable in spec.variables):
            return None
        parts = []
        for values, side in zip(self, SIDES, strict=True):
            # By numbers, not by a list, which would travel to the device.
            some = [values[place] for place in streamed_places(spec, side)]
            parts.append(torch.stack(some) if some else values[:0])
        return Variables(*parts)


class TargetWeights(NamedTuple):
    """What the gradients of variables through the rows' own formulas are made of, (N,) each.

    d loss / d logit of the targets, their cosines, the upstream gradients of the rows' losses, and
    the log-sum-exps of the negatives' logits.
    """

    target: Tensor
    cosine: Tensor
    rows: Tensor
    log_negatives: Tensor


def across_ranks(call: Call) -> bool:
    return call.ranks is not None and call.columns is None


def own_rows(call: Call) -> slice:
    """Places of the call's rows among those that have variables."""
    start = (call.self_offset or 0) if across_ranks(call) else 0
    return slice(start, start + call.rows.shape[0])


def number_given(spec: LossSpec, side: str) -> int:
    return sum(v.side == side and v.given for v in spec.variables)


def streamed_places(spec: LossSpec, side: str) -> list[int]:
    """Places of those that tiles read, among the variables of a side."""
    some = [variable for variable in spec.variables if variable.side == side]
    return [place for place, variable in enumerate(some) if variable.streamed]
