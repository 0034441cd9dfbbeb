"""Formulas of the rows of a class log-sum-exp that read variables: one launch for all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..streaming import Call, ClassSums, TargetWeights, Variables
from ..streaming.row_formulas import at_targets
from ..streaming.shards import ELSEWHERE
from ..streaming.variables import columns_not_finite
from . import launch
from .configs import VECTOR
from .kernels import row_formulas
from .losses import row_function
from .workspace import Workspace


def finish_rows(space: Workspace, sums: ClassSums, values: Variables) -> tuple[Tensor, Tensor]:
    """See ``Engine.finish_rows``."""
    call = space.call
    parts, count = sums.maximum.shape
    losses, state = space.empty(count), space.empty((4, count))
    doubtful = columns_not_finite(call, values) if len(values.columns) else None
    arguments, constants = _formula(call, values)
    launch.run(
        row_formulas.finish_formula_kernel,
        -(-count // VECTOR.block),
        *sums,
        call.row_labels,
        losses,
        state,
        parts,
        count,
        # All shards together have the target of every row that takes part.
        0 if call.shards is None else ELSEWHERE,
        *arguments[:-1],
        doubtful,
        arguments[-1],
        **constants,
    )
    return losses, state


def row_slopes(space: Workspace, values: Variables, weights: TargetWeights) -> Tensor:
    """See ``Engine.row_slopes``."""
    call, count = space.call, len(weights.target)
    slopes = space.empty((len(call.spec.variables), count))
    arguments, constants = _formula(call, values)
    launch.run(
        row_formulas.row_slopes_kernel,
        -(-count // VECTOR.block),
        weights.cosine,
        call.row_labels,
        weights.target,
        weights.rows,
        slopes,
        count,
        *arguments,
        **constants,
    )
    return slopes


def _formula(call: Call, values: Variables) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and constants of both kernels: variables, and the function that reads them."""
    formula = call.spec.formula
    assert formula is not None
    generated = row_function(formula)
    columns = at_targets(call, values.columns)
    scalars, rows, of_columns = (
        each if len(each) else None for each in (values.scalars, values.rows, columns)
    )
    matrices = (rows, values.rows.stride(0), of_columns, columns.stride(0))
    constants = {
        "ROW": generated.function,
        "SCALARS": len(values.scalars),
        "ROWS": len(values.rows),
        "COLUMNS": len(columns),
        "BLOCK": VECTOR.block,
        "num_warps": VECTOR.num_warps,
    }
    return (scalars, *matrices, generated.constants(call.params)), constants
