"""Tensors that a formula reads beside cosines and thresholds, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...losses import LossSpec
from ...policy.form import kernel_form
from ...policy.variable import (
    COLUMN_NORM,
    COMPUTED,
    ROW_NORM,
    SIDES,
    Side,
)
from .call import Call
from .computed import computed_value, target_places
from .engine import Engine
from .scattered import add_rows
from .values import Variables, across_ranks, number_given, own_rows, streamed_places


def of_call(call: Call, engine: Engine, unit: Tensor, inverse_norms: Tensor) -> Variables | None:
    """All variables of a call, the computed ones with them; None: the formula reads none.

    Args:
        unit, inverse_norms: of :meth:`Engine.unit_rows`.
    """
    spec = call.spec
    if not spec.variables:
        return None
    width = call.num_columns
    # Those of other ranks' rows, too, which the other direction of a pair reads.
    count = width if across_ranks(call) else call.rows.shape[0]
    scalars, rows, columns = (number_given(spec, side) for side in ("scalar", "row", "column"))
    given = call.variables
    if given is None:
        given = unit.new_empty(0, dtype=torch.float32)
    parts = given.split([scalars, rows * count, columns * width])
    computed: dict[Side, list[Tensor]] = {"scalar": [], "row": [], "column": []}
    for variable in spec.variables:
        if not variable.given:
            value = computed_value(variable.name, call, engine, unit, inverse_norms)
            computed[COMPUTED[variable.name]].append(value)
    return Variables(
        _joined(parts[0], computed["scalar"]),
        _joined(parts[1].view(rows, count), computed["row"]),
        _joined(parts[2].view(columns, width), computed["column"]),
    )


def _joined(given: Tensor, computed: list[Tensor]) -> Tensor:
    if not computed:
        return given
    found = torch.stack(computed) if len(computed) > 1 else computed[0][None]
    return torch.cat([given, found]) if len(given) else found


def of_targets(call: Call, values: Variables, slopes: Tensor) -> Variables:
    """Gradients through the targets' logits and the rows' own terms, from
    :meth:`Engine.row_slopes`; those of scalars are by row, (S, N).
    """
    scalars, rows = len(values.scalars), len(values.scalars) + len(values.rows)
    columns = torch.zeros_like(values.columns)
    for total, slope in zip(columns, slopes[rows:], strict=True):
        if total.numel():
            add_rows(total, target_places(call), slope)
    return Variables(slopes[:scalars], slopes[scalars:rows], columns)


def _stacked(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like.new_zeros((0, *like.shape))


def needed(call: Call) -> bool:
    """Whether gradients of variables that tiles read are."""
    norms = {v.name for v in call.spec.variables if v.streamed} & {ROW_NORM, COLUMN_NORM}
    return call.need_variables or (bool(norms) and (call.need_rows or call.need_columns))


def factor(call: Call) -> int | None:
    """The place of the one scalar that tiles read if its gradient through negatives follows from
    that of the rows, see ``KernelForm.factor`` and docs/math.md, "Numbers as tensors". None: there
    is none, or tiles are to add it up; in half precision those of the rows are rounded.
    """
    formula = call.spec.formula
    assert formula is not None
    found = kernel_form(formula).factor
    alone = sum(variable.streamed for variable in formula.variables) == 1
    wanted = call.need_variables and call.need_rows and call.compute_dtype == torch.float32
    return found if alone and wanted else None


def zeros_by_row(call: Call, values: Variables, dtype: torch.dtype) -> Variables | None:
    """Gradients of tiles to be accumulated, those of scalars by row, (S, N); None: not needed."""
    if not needed(call):
        return None
    count = call.rows.shape[0]
    sizes = (len(values.scalars), count), (len(values.rows), count), values.columns.shape
    return Variables(*(values.rows.new_zeros(size, dtype=dtype) for size in sizes))


def by_rows(call: Call, values: Variables, slopes: Sequence[Tensor]) -> Variables:
    """Gradients through formulas of the rows, those of scalars by row.

    Args:
        values: all variables.
        slopes: (N,) of every row's loss by each of :meth:`Variables.of_rows`.
    """
    scalars, like = len(values.scalars), values.rows.new_empty(call.rows.shape[0])
    first, others = (_stacked(list(some), like) for some in (slopes[:scalars], slopes[scalars:]))
    return Variables(first, others, torch.zeros_like(values.columns))


def joined(
    call: Call, values: Variables, of_rows: Variables | None, tiles: Variables | None
) -> Variables:
    """Gradients of all variables, float64.

    Args:
        values: all variables.
        of_rows: those through the rows' own logits and formulas, of scalars by row.
        tiles: those of the tiles' variables.
    """
    found = zeros_like(values, torch.float64)
    if of_rows is not None:
        found.scalars.add_(of_rows.scalars.to(torch.float64).sum(dim=1))
        found.rows[:, own_rows(call)] += of_rows.rows
        found.columns.add_(of_rows.columns)
    if tiles is not None:
        scalars = tiles.scalars if tiles.scalars.dim() == 1 else tiles.scalars.sum(dim=1)
        for side, total, own in zip(SIDES, found, tiles._replace(scalars=scalars), strict=True):
            for place, gradient in zip(streamed_places(call.spec, side), own, strict=True):
                total[place] += gradient
    return found


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
    """Adds to the gradient (N, D) of the rows that through their norms, if the formula reads them,
    also as columns.

    Args:
        unit, inverse_norms: of :meth:`Engine.unit_rows`.
        scale: () factor, or None.
    """
    slope = None
    place = _place(call.spec, ROW_NORM)
    if place is not None:
        slope = gradients.rows[place, own_rows(call)]
    place = _place(call.spec, COLUMN_NORM)
    if place is not None and call.columns is None:
        of_columns = gradients.columns[place]
        if call.ranks is not None:
            of_columns = call.ranks.own_sums(of_columns)
        slope = of_columns if slope is None else slope + of_columns
    if slope is None:
        return
    slope = slope.to(torch.float32)
    slope = slope if scale is None else slope * scale
    if not call.spec.normalize:
        # The derivative is the unit row, which these are not.
        slope = slope * inverse_norms
    # A clamped norm is constant.
    slope = torch.where(call.ignored | (inverse_norms >= 1e5), 0.0, slope)
    d_rows.addcmul_(slope[:, None], unit.to(torch.float32))


def _place(spec: LossSpec, name: str) -> int | None:
    """Place of a variable among those of its side; None: the formula does not read it."""
    names = [variable.name for variable in spec.variables if variable.side == COMPUTED[name]]
    return names.index(name) if name in names else None


def column_norm_slopes(call: Call, gradients: Variables | None) -> Tensor | None:
    """(M,) gradients by the norms of columns that are no rows, which tiles still add to; None: the
    formula reads none.
    """
    place = _place(call.spec, COLUMN_NORM)
    if gradients is None or place is None or call.columns is None or not call.need_columns:
        return None
    return gradients.columns[place]


def of_given(call: Call, gradients: Variables, scale: Tensor | None) -> Tensor:
    """Gradient of ``Call.variables``; ``scale``: () factor, or None."""
    sides = zip(gradients, SIDES, strict=True)
    joined = torch.cat([part[: number_given(call.spec, side)].flatten() for part, side in sides])
    return (joined if scale is None else joined * scale).to(torch.float32)


def not_finite(call: Call, values: Variables) -> Tensor:
    """(num_losses,) float32: NaN for a row that reads a value that is not finite, else 0."""
    doubtful = (values.scalars * 0.0).sum()
    if len(values.columns):
        doubtful = doubtful + columns_not_finite(call, values)
    of_rows = (values.rows[:, own_rows(call)] * 0.0).sum(0) + doubtful
    if not call.both:
        return of_rows
    return torch.cat([of_rows, doubtful.expand(call.num_columns)])


def columns_not_finite(call: Call, values: Variables) -> Tensor:
    """() NaN if a variable of any column is not finite, else 0."""
    found = (values.columns * 0.0).sum()
    # The same on every rank, of which each has some columns.
    return found if call.shards is None else call.shards.sum(found)
