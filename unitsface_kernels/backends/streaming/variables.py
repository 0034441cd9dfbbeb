"""Tensors that a formula reads beside cosines and thresholds, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import LossSpec
from ...policy import eager
from ...policy.derive import derivative
from ...policy.expression import Expression, constant, is_const, value_of
from ...policy.form import kernel_form
from ...policy.formula import (
    COSINE,
    Formula,
    number_bindings,
    variable_bindings,
    variable_leaves,
)
from ...policy.variable import (
    COLUMN_NORM,
    COMPUTED,
    ROW_NORM,
    SIDES,
    Side,
    Variable,
)
from .call import Call
from .computed import across_ranks, computed_value, target_places
from .engine import Engine, TileVariables
from .scattered import add_rows


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
            some = [values[place] for place in _streamed(spec, side)]
            parts.append(torch.stack(some) if some else values[:0])
        return Variables(*parts)


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
    scalars, rows, columns = (_number(spec, side) for side in ("scalar", "row", "column"))
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
    return torch.cat([given, torch.stack(computed)]) if computed else given


def own_rows(call: Call) -> slice:
    """Places of the call's rows among those that have variables."""
    start = (call.self_offset or 0) if across_ranks(call) else 0
    return slice(start, start + call.rows.shape[0])


def _number(spec: LossSpec, side: str) -> int:
    return sum(v.side == side and v.given for v in spec.variables)


def _streamed(spec: LossSpec, side: str) -> list[int]:
    """Places of those that tiles read, among the variables of a side."""
    some = [variable for variable in spec.variables if variable.side == side]
    return [place for place, variable in enumerate(some) if variable.streamed]


def target(call: Call, values: Variables | None, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) logits of the targets of a ``logsumexp`` loss over classes, and their derivatives by the
    cosines: of N numbers, by Torch.

    Args:
        values: all variables, None if the formula reads none.
        cosine: (N,) of the targets.
    """
    formula = call.spec.formula
    assert formula is not None
    logit, slope = _of_target(call, values, cosine, _by(formula.positive, formula)[:2])
    return logit, slope


def _of_target(
    call: Call, values: Variables | None, cosine: Tensor, expressions: Sequence[Expression]
) -> list[Tensor]:
    """(N,) each: functions of the targets' cosines and variables."""
    formula = call.spec.formula
    assert formula is not None
    if all(is_const(e) for e in expressions):
        return [torch.full_like(cosine, value_of(e)) for e in expressions]
    bindings: dict[Expression, Tensor | float] = {
        COSINE: cosine,
        **number_bindings(formula, call.params),
    }
    if values is not None:
        of_columns = values.columns.new_zeros(len(values.columns), len(cosine))
        if len(values.columns):
            if call.num_columns:
                of_columns = values.columns[:, target_places(call)]
                of_columns = torch.where(call.row_labels >= 0, of_columns, 0.0)
            if call.shards is not None:
                of_columns = call.shards.sum(of_columns)
        given = [*values.scalars, *values.rows, *of_columns]
        bindings.update(variable_bindings(formula, given))
    return _evaluated(expressions, bindings, cosine)


def _evaluated(
    expressions: Sequence[Expression],
    bindings: dict[Expression, Tensor | float],
    like: Tensor,
) -> list[Tensor]:
    """(N,) each, as ``like``."""
    found = eager.evaluate_all([e for e in expressions if not is_const(e)], bindings)
    values = iter(found)
    # A constant of the host would be a copy to the device.
    return [
        torch.full_like(like, value_of(e)) if is_const(e) else next(values).to(like).expand_as(like)
        for e in expressions
    ]


@cache
def _by(of: Expression | None, formula: Formula) -> list[Expression]:
    """A function of the row, and its derivatives by the cosine and by every variable; of nothing,
    zeros.
    """
    leaves = (COSINE, *variable_leaves(formula))
    if of is None:
        return [constant(0)] * (1 + len(leaves))
    return [of, *(derivative(of, by) for by in leaves)]


def regularizer(call: Call, values: Variables) -> Tensor | None:
    """(N,) terms that are added to the losses of rows; None: there are none."""
    formula = call.spec.formula
    assert formula is not None
    if formula.regularizer is None:
        return None
    return _of_row(call, values, _by(formula.regularizer, formula)[:1])[0]


def _of_row(call: Call, values: Variables, expressions: Sequence[Expression]) -> list[Tensor]:
    """(N,) each: functions of the variables of rows and of scalars."""
    formula = call.spec.formula
    assert formula is not None
    of_rows = values.rows[:, own_rows(call)]
    # It reads none of columns.
    given = variable_leaves(formula)[: len(values.scalars) + len(of_rows)]
    bindings: dict[Expression, Tensor | float] = {
        **dict(zip(given, [*values.scalars, *of_rows], strict=True)),
        **number_bindings(formula, call.params),
    }
    return _evaluated(expressions, bindings, values.rows.new_empty(call.rows.shape[0]))


def need_gradients(call: Call) -> bool:
    """Whether a gradient depends on a row's variables."""
    formula = call.spec.formula
    assert formula is not None
    wanted = [
        place
        for place, variable in enumerate(formula.variables)
        if (call.need_variables if variable.given else call.need_rows and _is_norm(variable))
    ]
    if any(formula.variables[place].streamed for place in wanted):
        return True
    slopes = (_by(of, formula)[2:] for of in (formula.positive, formula.regularizer))
    # A given variable gets a gradient even if it is zero.
    given = any(formula.variables[place].given for place in wanted)
    return given or any(not is_const(each[place], 0.0) for each in slopes for place in wanted)


def _is_norm(variable: Variable) -> bool:
    return variable.name == ROW_NORM


def of_targets(
    call: Call, values: Variables, negative_weight: Tensor, target_cosine: Tensor, weights: Tensor
) -> Variables:
    """Gradients through the targets' logits and the rows' own terms; those of scalars are by row,
    (S, N).

    Args:
        negative_weight: (N,) minus d loss / d logit.
        target_cosine: (N,).
        weights: (N,) upstream gradients.
    """
    formula, has_target = call.spec.formula, call.row_labels >= 0
    assert formula is not None
    here = torch.where(has_target, -negative_weight, 0.0)
    of_logits = _of_target(call, values, target_cosine, _by(formula.positive, formula)[2:])
    slopes = [_weighted(here, slope) for slope in of_logits]
    if formula.regularizer is not None:
        # Only the shard with the target has the term's gradient.
        here = torch.where(has_target, weights, 0.0)
        of_terms = _of_row(call, values, _by(formula.regularizer, formula)[2:])
        pairs = zip(slopes, of_terms, strict=True)
        slopes = [total + _weighted(here, slope) for total, slope in pairs]
    scalars, rows = len(values.scalars), len(values.scalars) + len(values.rows)
    columns = torch.zeros_like(values.columns)
    for total, slope in zip(columns, slopes[rows:], strict=True):
        if total.numel():
            add_rows(total, target_places(call), slope)
    like = negative_weight
    return Variables(
        _stacked(slopes[:scalars], like), _stacked(slopes[scalars:rows], like), columns
    )


def _weighted(weights: Tensor, slope: Tensor) -> Tensor:
    return torch.where(weights == 0.0, 0.0, weights * slope)


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
            for place, gradient in zip(_streamed(call.spec, side), own, strict=True):
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
    joined = torch.cat([part[: _number(call.spec, side)].flatten() for part, side in sides])
    return (joined if scale is None else joined * scale).to(torch.float32)


def not_finite(call: Call, values: Variables) -> Tensor:
    """(num_losses,) float32: NaN for a row that reads a value that is not finite, else 0."""
    shared = torch.cat([values.scalars, values.columns.flatten()])
    doubtful = (shared * 0.0).sum()
    if call.shards is not None and len(values.columns):
        # The same on every rank, of which each has some columns.
        doubtful = call.shards.sum(doubtful)
    of_rows = (values.rows[:, own_rows(call)] * 0.0).sum(0) + doubtful
    if not call.both:
        return of_rows
    return torch.cat([of_rows, doubtful.expand(call.num_columns)])
