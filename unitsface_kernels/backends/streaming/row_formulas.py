"""Formulas of the rows of a class log-sum-exp, of N numbers, in operations of Torch: the targets'
logits, regularizers, and their derivatives by variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ...losses import EMPTY
from ...policy import eager
from ...policy.derive import derivative
from ...policy.expression import Expression, constant, is_const, value_of
from ...policy.formula import (
    COSINE,
    Formula,
    number_bindings,
    variable_bindings,
    variable_leaves,
)
from ...policy.variable import ROW_NORM, Variable
from .call import Call
from .computed import target_places
from .values import TargetWeights, Variables, own_rows


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
        given = [*values.scalars, *values.rows, *at_targets(call, values.columns)]
        bindings.update(variable_bindings(formula, given))
    return _evaluated(expressions, bindings, cosine)


def at_targets(call: Call, columns: Tensor) -> Tensor:
    """(C, N) of (C, M) variables of columns, at the targets of all shards; 0 without one."""
    shape = len(columns), len(call.row_labels)
    if not len(columns):
        return columns.new_empty(shape)
    found = columns.new_zeros(shape)
    if call.num_columns:
        found = torch.where(call.row_labels >= 0, columns[:, target_places(call)], found)
    return found if call.shards is None else call.shards.sum(found)


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
    of_rows = (formula.positive, formula.regularizer, formula.finish)
    slopes = (_by(of, formula)[2:] for of in of_rows)
    # A given variable gets a gradient even if it is zero.
    given = any(formula.variables[place].given for place in wanted)
    return given or any(not is_const(each[place], 0.0) for each in slopes for place in wanted)


def _is_norm(variable: Variable) -> bool:
    return variable.name == ROW_NORM


def needed_again(call: Call) -> bool:
    """Whether the backward pass reads variables."""
    streamed = any(variable.streamed for variable in call.spec.variables)
    return streamed or (bool(call.spec.variables) and need_gradients(call))


def row_slopes(call: Call, values: Variables, weights: TargetWeights) -> Tensor:
    """See :meth:`Engine.row_slopes`."""
    formula, has_target = call.spec.formula, call.row_labels >= 0
    assert formula is not None
    here = torch.where(has_target, weights.target, 0.0)
    logits, _, *of_logits = _of_target(call, values, weights.cosine, _by(formula.positive, formula))
    slopes = [_weighted(here, slope) for slope in of_logits]
    # Only the shard with the target has the gradients of the row's own terms.
    here, of_terms = torch.where(has_target, weights.rows, 0.0), []
    if formula.regularizer is not None:
        of_terms = _of_row(call, values, _by(formula.regularizer, formula)[2:])
    elif call.spec.finish is not None:
        target = torch.where(has_target, logits, EMPTY)
        negatives = weights.log_negatives
        negatives = torch.where(negatives == -torch.inf, EMPTY, negatives)
        of_rows = values.of_rows(call)
        of_terms = call.spec.finish.slopes(target, negatives, call.params, of_rows)[2:]
    for place, slope in enumerate(of_terms):
        slopes[place] = slopes[place] + _weighted(here, slope)
    return torch.stack(slopes)


def _weighted(weights: Tensor, slope: Tensor) -> Tensor:
    return torch.where(weights == 0.0, 0.0, weights * slope)
