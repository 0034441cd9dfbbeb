"""Rows of ``logsumexp`` losses over classes whose formula reads variables."""

from __future__ import annotations

import triton
import triton.language as tl

from ..losses.math import softplus_and_sigmoid
from .logsumexp import log_of_sums
from .variables import scalar_values

#: Places in what the function of a row returns, see ``policy/triton_rows.py``.
_TERM = tl.constexpr(2)
_SLOPES = tl.constexpr(3)


@triton.jit
def of_each(values, stride, place, mask, COUNT: tl.constexpr):
    """The numbers at ``place`` of each row of a matrix (COUNT, n)."""
    found = ()
    for k in tl.static_range(COUNT):
        # 1 is what ignored rows have.
        found += (tl.load(values + k * stride + place, mask=mask, other=1.0),)  # type: ignore[assignment]
    return found


@triton.jit(do_not_specialize=["parts", "rows", "lowest", "row_stride", "column_stride"])
def finish_formula_kernel(
    maximum,
    total,
    target_cosine,
    targets,
    losses,
    state,
    parts,
    rows,
    lowest,
    scalars,
    of_rows,
    row_stride,
    of_columns,
    column_stride,
    doubtful,
    parameters,
    ROW: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As ``finish_rows_kernel``, with the state (4, rows), whose last row is the target's cosine.

    Variables: ``scalars`` (SCALARS,), ``of_rows`` (ROWS, rows), and ``of_columns`` (COLUMNS, rows)
    those of the rows' targets. Losses of rows that read one that is not finite are NaN;
    ``doubtful`` (1,) is 0, or NaN if a value of any column is not finite, or None.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < rows
    log_negatives = log_of_sums(maximum, total, i, mask, parts, rows, BLOCK)
    target = tl.load(targets + i, mask=mask, other=-1)
    cosine = tl.load(target_cosine + i, mask=mask, other=0.0)
    own = scalar_values(scalars, SCALARS) + of_each(of_rows, row_stride, i, mask, ROWS)
    variables = own + of_each(of_columns, column_stride, i, mask, COLUMNS)
    found = ROW(cosine, variables, parameters)
    zero = tl.zeros((BLOCK,), dtype=tl.float32)
    logit, slope, term = zero + found[0], zero + found[1], zero + found[_TERM]
    gap = log_negatives - logit
    softplus, sigmoid = softplus_and_sigmoid(gap)
    has_target = (target >= lowest) & (target != -1)
    loss = tl.where(has_target, softplus, log_negatives) + term
    for k in tl.static_range(SCALARS + ROWS):
        loss += own[k] * 0.0
    if doubtful is not None:
        loss += tl.load(doubtful)
    tl.store(losses + i, tl.where(target == -1, 0.0, loss), mask=mask)
    tl.store(state + i, log_negatives, mask=mask)
    tl.store(state + rows + i, tl.where(has_target, sigmoid, 1.0), mask=mask)
    tl.store(state + 2 * rows + i, slope, mask=mask)
    tl.store(state + 3 * rows + i, cosine, mask=mask)


@triton.jit(do_not_specialize=["rows", "row_stride", "column_stride"])
def row_slopes_kernel(
    target_cosine,
    targets,
    target_weight,
    weights,
    slopes,
    rows,
    scalars,
    of_rows,
    row_stride,
    of_columns,
    column_stride,
    parameters,
    ROW: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``slopes`` (SCALARS + ROWS + COLUMNS, rows): of each row's loss by each variable, through the
    target's logit and the regularizer.

    ``target_weight`` (rows,): d loss / d logit; ``weights`` (rows,): upstream gradients. A row
    without a target among the columns of the call has none. Others as of
    ``finish_formula_kernel``.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < rows
    here = tl.load(targets + i, mask=mask, other=-1) >= 0
    cosine = tl.load(target_cosine + i, mask=mask, other=0.0)
    of_logit = tl.where(here, tl.load(target_weight + i, mask=mask, other=0.0), 0.0)
    of_term = tl.where(here, tl.load(weights + i, mask=mask, other=0.0), 0.0)
    variables = scalar_values(scalars, SCALARS)
    variables += of_each(of_rows, row_stride, i, mask, ROWS)
    variables += of_each(of_columns, column_stride, i, mask, COLUMNS)
    found = ROW(cosine, variables, parameters)
    COUNT: tl.constexpr = SCALARS + ROWS + COLUMNS
    for k in tl.static_range(COUNT):
        # 0 times a slope that is not finite.
        slope = tl.where(of_logit == 0.0, 0.0, of_logit * found[_SLOPES + k])
        slope += tl.where(of_term == 0.0, 0.0, of_term * found[_SLOPES + COUNT + k])
        tl.store(slopes + k * rows + i, slope, mask=mask)
