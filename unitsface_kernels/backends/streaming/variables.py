"""Tensors that a formula reads beside cosines and thresholds, and their gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import LossSpec
from ...policy.variable import ROW_NORM
from .call import Call
from .engine import Engine, TileVariables


class Variables(NamedTuple):
    """Values, in float32, or gradients of all variables of a call, in the order of the spec.

    Attributes:
        scalars: (S,).
        rows: (R, N), the given ones first.
        columns: (C, M).
    """

    scalars: Tensor
    rows: Tensor
    columns: Tensor

    def tile(self, rows: slice, columns: slice, own: int, both: bool) -> TileVariables:
        """Those of a tile.

        Args:
            rows, columns: places among all rows and columns.
            own: place of the rows among the columns, with ``both``.
            both: rows and columns are of the same kind, and the tile has the other direction too.
        """
        place = slice(rows.start + own, rows.stop + own)
        return TileVariables(
            self.scalars,
            self.rows[:, rows],
            self.columns[:, columns],
            self.rows[:, columns] if both else None,
            self.columns[:, place] if both else None,
        )


def of_call(call: Call, engine: Engine, unit: Tensor, inverse_norms: Tensor) -> Variables | None:
    """All variables of a call, the computed ones with them; None: the formula reads none.

    Args:
        unit, inverse_norms: of :meth:`Engine.unit_rows`.
    """
    spec = call.spec
    if not spec.variables:
        return None
    count, width = call.rows.shape[0], call.num_columns
    scalars, rows, columns = (_number(spec, side) for side in ("scalar", "row", "column"))
    given = call.variables
    if given is None:
        given = unit.new_empty(0, dtype=torch.float32)
    parts = given.split([scalars, rows * count, columns * width])
    of_rows = parts[1].view(rows, count)
    computed = [
        _norms(call, inverse_norms)
        if variable.name == ROW_NORM
        else target_cosines(call, engine, unit)
        for variable in spec.variables
        if not variable.given
    ]
    if computed:
        of_rows = torch.cat([of_rows, torch.stack(computed)])
    return Variables(parts[0], of_rows, parts[2].view(columns, width))


def _number(spec: LossSpec, side: str) -> int:
    return sum(v.side == side and v.given for v in spec.variables)


def _norms(call: Call, inverse_norms: Tensor) -> Tensor:
    return torch.where(call.ignored, 1.0, 1.0 / inverse_norms)


def target_cosines(call: Call, engine: Engine, unit: Tensor) -> Tensor:
    """(N,) float32 cosines of the rows with their classes, 0 without one; of all shards."""
    cosines = unit.new_zeros(unit.shape[0], dtype=torch.float32)
    if call.num_columns:
        place = call.row_labels.clamp(0, call.num_columns - 1)
        index = place if call.column_index is None else call.column_index[place]
        assert call.columns is not None
        targets, _ = engine.normalize_rows(call.columns, 0, unit.shape[0], index, reuse=True)
        products = torch.linalg.vecdot(unit.to(torch.float32), targets.to(torch.float32))
        cosines = torch.where(call.row_labels >= 0, products, cosines)
    return cosines if call.shards is None else call.shards.sum(cosines)


def zeros_like(values: Variables, dtype: torch.dtype) -> Variables:
    """Gradients to be accumulated."""
    return Variables(*(torch.zeros_like(value, dtype=dtype) for value in values))


def add_norms(
    call: Call,
    gradients: Variables,
    d_rows: Tensor,
    unit: Tensor,
    inverse_norms: Tensor,
    scale: Tensor | None,
) -> None:
    """Adds to the gradient (N, D) of the rows that through their norms, if the formula reads them.

    Args:
        unit, inverse_norms: of :meth:`Engine.unit_rows`.
        scale: () factor, or None.
    """
    names = [variable.name for variable in call.spec.variables if variable.side == "row"]
    if ROW_NORM not in names:
        return
    slope = gradients.rows[names.index(ROW_NORM)].to(torch.float32)
    slope = slope if scale is None else slope * scale
    # A clamped norm is constant.
    slope = torch.where(call.ignored | (inverse_norms >= 1e5), 0.0, slope)
    d_rows.addcmul_(slope[:, None], unit.to(torch.float32))


def of_given(call: Call, gradients: Variables, scale: Tensor | None) -> Tensor:
    """Gradient of ``Call.variables``; ``scale``: () factor, or None."""
    rows = gradients.rows[: _number(call.spec, "row")]
    joined = torch.cat([gradients.scalars, rows.flatten(), gradients.columns.flatten()])
    return (joined if scale is None else joined * scale).to(torch.float32)


def not_finite(values: Variables) -> Tensor:
    """(N,) float32: NaN for a row that reads a value that is not finite, else 0."""
    shared = torch.cat([values.scalars, values.columns.flatten()])
    return (values.rows * 0.0).sum(0) + (shared * 0.0).sum()
