"""Kernels of ``logsumexp`` losses: statistics of the negatives, and gradient tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from ..losses.math import softplus_and_sigmoid
from .tiles import column_factors, column_subtiles, cosine_tile, grouped_block
from .variables import logits_of, scalar_values, store_column_sums, store_row_sums, values_at

#: exp2 is one instruction; exp would add the multiplication and a guard for denormals.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def negative_logits(
    products,
    factors,
    parameters,
    variables,
    NEGATIVE: tl.constexpr,
    LINEAR: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Logits of products with columns that are times ``factors`` away from unit length, and d
    logit / d cosine times these factors: what a gradient tile has for each product. Then d logit /
    d each of the COUNT variables.
    """
    cosine = factors if LINEAR else products * factors
    terms = logits_of(NEGATIVE, cosine, parameters, variables, COUNT)
    if LINEAR:
        # One multiplication per pair: the column's factor and the logit's are multiplied before.
        found = (products * terms[0], terms[0])
        for k in tl.static_range(COUNT):
            found += (products * terms[2 + k],)  # type: ignore[assignment]
        return found
    else:
        found = (terms[0], terms[1] * factors)
        for k in tl.static_range(COUNT):
            found += (terms[2 + k],)  # type: ignore[assignment]
        return found


@triton.jit
def has_one(target, column, WIDTH: tl.constexpr):
    """Whether a target is among the ``WIDTH`` columns from ``column``."""
    inside = (target >= column) & (target < column + WIDTH)
    return tl.max(inside.to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=["rows", "columns", "start", "row_stride", "column_stride"])
def statistics_kernel(
    a,
    b,
    a_stride,
    b_stride,
    rows,
    columns,
    DEPTH: tl.constexpr,
    b_factors,
    targets,
    start,
    block_maximum,
    block_total,
    target_cosine,
    scalars,
    a_rows,
    row_stride,
    b_columns,
    column_stride,
    parameters,
    NEGATIVE: tl.constexpr,
    LINEAR: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Per block of columns and row: largest negative logit and sum of exp(logit - largest).

    ``block_maximum``, ``block_total``: (column blocks, rows). A target's
    cosine goes to ``target_cosine`` (rows,), by the one program that meets it. ``b_factors``
    (columns,): see ``column_factors``. Variables: ``scalars`` (SCALARS,), ``a_rows`` (ROWS, rows),
    ``b_columns`` (COLUMNS, columns); None where there are none.
    """
    row_blocks = tl.cdiv(rows, BLOCK_M)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    row_block, column_block = grouped_block(tl.program_id(0), row_blocks, column_blocks, GROUP_M)
    row = row_block * BLOCK_M
    column = column_block * BLOCK_N
    products = cosine_tile(
        a, b, a_stride, b_stride, row, column, rows, columns, DEPTH,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    i = row + tl.arange(0, BLOCK_M)
    in_rows = i < rows
    target = tl.load(targets + i, mask=in_rows, other=-1).to(tl.int32) - start
    own_variables = scalar_values(scalars, SCALARS) + values_at(
        a_rows, row_stride, i, in_rows, 1, ROWS
    )
    READ: tl.constexpr = SCALARS + ROWS + COLUMNS
    # A variable may be 0 or less: -inf times it is no logit of -inf.
    BEFORE: tl.constexpr = LINEAR and READ == 0
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    subtiles = column_subtiles(products, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    # Few blocks have a target or columns past the end: the others compare none.
    takes_out = has_one(target, column, BLOCK_N) | (column + BLOCK_N > columns)
    largest = tl.full((BLOCK_M,), -float("inf"), dtype=tl.float32)
    summed = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        first = column + subtile * WIDTH
        j = first + tl.arange(0, WIDTH)
        part = subtiles[subtile]
        factors = column_factors(b_factors, j)
        if takes_out:
            is_target = target[:, None] == j[None, :]
            own = tl.sum(tl.where(is_target, part * factors, 0.0), axis=1)
            has_target = (target >= first) & (target < tl.minimum(first + WIDTH, columns))
            tl.store(target_cosine + i, own, mask=has_target)
            outside = (j >= columns)[None, :]
            if BEFORE:
                part = tl.where(is_target | outside, -float("inf"), part)
            if b_factors is not None:
                factors = tl.where(outside, 1.0, factors)
        j_variables = values_at(b_columns, column_stride, j, j < columns, 0, COLUMNS)
        logit = negative_logits(
            part, factors, parameters, own_variables + j_variables, NEGATIVE, LINEAR, READ
        )[0]
        if not BEFORE:  # noqa: SIM102
            if takes_out:
                left_out = (target[:, None] == j[None, :]) | (j >= columns)[None, :]
                logit = tl.where(left_out, -float("inf"), logit)
        maximum = tl.maximum(largest, tl.max(logit, axis=1))
        # Without negatives the maximum is -inf, and -inf - -inf would be NaN.
        shift = tl.where(maximum == -float("inf"), 0.0, maximum)
        total = tl.sum(tl.exp2((logit - shift[:, None]) * LOG2_E), axis=1)
        summed = summed * tl.exp2((largest - shift) * LOG2_E) + total
        largest = maximum
    out = column_block.to(tl.int64) * rows + i
    tl.store(block_maximum + out, largest, mask=in_rows)
    tl.store(block_total + out, summed, mask=in_rows)


@triton.jit(do_not_specialize=["rows", "stretches"])
def merge_kernel(
    stretch_maximum,
    stretch_total,
    maximum,
    total,
    stretches,
    rows,
    FOLDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Folds (stretches, rows) statistics into the running (rows,) ones, in a fixed order; without
    ``FOLDS`` into none, which they replace.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = i < rows
    if FOLDS:
        largest = tl.load(maximum + i, mask=in_rows, other=-float("inf"))
        summed = tl.load(total + i, mask=in_rows, other=0.0)
    else:
        largest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
        summed = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, stretches, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = (k < stretches)[:, None] & in_rows[None, :]
        place = k[:, None].to(tl.int64) * rows + i[None, :]
        part_maximum = tl.load(stretch_maximum + place, mask=mask, other=-float("inf"))
        part = tl.load(stretch_total + place, mask=mask, other=0.0)
        new = tl.maximum(largest, tl.max(part_maximum, axis=0))
        # As above: no negatives so far.
        shift = tl.where(new == -float("inf"), 0.0, new)
        part = tl.sum(part * tl.exp(part_maximum - shift[None, :]), axis=0)
        summed = summed * tl.exp(largest - shift) + part
        largest = new
    tl.store(maximum + i, largest, mask=in_rows)
    tl.store(total + i, summed, mask=in_rows)


@triton.jit(
    do_not_specialize=["rows", "columns", "start", "row_stride", "column_stride"],
    do_not_specialize_on_alignment=["taken", "count"],
)
def gradient_kernel(
    a,
    b,
    a_stride,
    b_stride,
    rows,
    columns,
    DEPTH: tl.constexpr,
    b_factors,
    targets,
    start,
    log_negatives,
    negative_weight,
    target_gradient,
    gradient,
    gradient_stride,
    gradient_scale,
    taken,
    count,
    scalars,
    a_rows,
    row_stride,
    b_columns,
    column_stride,
    of_rows,
    of_columns,
    parameters,
    NEGATIVE: tl.constexpr,
    LINEAR: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d loss / d cosine of a tile, times ``b_factors`` (columns,), see ``column_factors``.

    ``gradient_scale``: (1,) factor for float16, or None. ``taken``: (rows,) int32 of whose first
    ``count`` rows the gradient is wanted; None: of all. Variables as of ``statistics_kernel``. What
    the negatives' derivatives by them add up to, or None: ``of_rows`` (SCALARS + ROWS, column
    blocks, rows) over columns, ``of_columns`` (COLUMNS, row blocks, columns) over rows.
    """
    row_blocks = tl.cdiv(rows, BLOCK_M)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    row_block, column_block = grouped_block(tl.program_id(0), row_blocks, column_blocks, GROUP_M)
    row = row_block * BLOCK_M
    column = column_block * BLOCK_N
    if taken is not None:
        rows = tl.load(count)
        if row >= rows:
            return
    products = cosine_tile(
        a, b, a_stride, b_stride, row, column, rows, columns, DEPTH,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, taken,
    )  # fmt: skip
    i = row + tl.arange(0, BLOCK_M)
    j = column + tl.arange(0, BLOCK_N)
    in_rows = i < rows
    if taken is not None:
        i = tl.load(taken + i, mask=in_rows, other=0)
    target = tl.load(targets + i, mask=in_rows, other=-1).to(tl.int32) - start
    normalizer = tl.load(log_negatives + i, mask=in_rows, other=0.0)
    weight = tl.load(negative_weight + i, mask=in_rows, other=0.0)
    own = tl.load(target_gradient + i, mask=in_rows, other=0.0)
    unscaled = weight[:, None]
    if gradient_scale is not None:
        factor = tl.load(gradient_scale)
        weight *= factor
        own *= factor
    factors = column_factors(b_factors, j)
    variables = scalar_values(scalars, SCALARS)
    variables += values_at(a_rows, row_stride, i, in_rows, 1, ROWS)
    variables += values_at(b_columns, column_stride, j, j < columns, 0, COLUMNS)
    terms = negative_logits(
        products, factors, parameters, variables, NEGATIVE, LINEAR, SCALARS + ROWS + COLUMNS
    )
    probability = tl.exp2((terms[0] - normalizer[:, None]) * LOG2_E)
    # In this order: without factors the slope of a linear logit is one number.
    value = (weight[:, None] * terms[1]) * probability
    if of_rows is not None or of_columns is not None:
        share = unscaled * probability
        counted = in_rows[:, None] & (j < columns)[None, :] & (target[:, None] != j[None, :])
    if of_rows is not None:
        out = of_rows + column_block.to(tl.int64) * rows + i
        plane = column_blocks.to(tl.int64) * rows
        store_row_sums(out, terms, counted, share, plane, in_rows, 2, SCALARS + ROWS)
    if of_columns is not None:
        out = of_columns + row_block.to(tl.int64) * columns + j[None, :]
        plane = row_blocks.to(tl.int64) * columns
        store_column_sums(
            out, terms, counted, share, plane, (j < columns)[None, :], 2 + SCALARS + ROWS, COLUMNS
        )
    if has_one(target, column, BLOCK_N):
        value = tl.where(
            target[:, None] == j[None, :], own[:, None] * column_factors(b_factors, j), value
        )
    # Up to the padded width: full-width stores, and the caller never reads past the columns.
    corner = gradient + row.to(tl.int64) * gradient_stride + column
    place = (i - row)[:, None] * gradient_stride + (j - column)[None, :]
    inside = in_rows[:, None] & (j < gradient_stride)[None, :]
    tl.store(corner + place, value.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def log_of_sums(maximum, total, i, mask, parts, rows, BLOCK: tl.constexpr):
    """Log of the sums of rows ``i``, of (parts, rows) maxima and totals; -inf of none."""
    place = i.to(tl.int64)
    highest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, parts):
        largest = tl.load(maximum + place, mask=mask, other=-float("inf"))
        found = tl.load(total + place, mask=mask, other=0.0)
        # Comparisons, which keep a NaN: it is in every later sum.
        new = tl.where(largest > highest, largest, highest)
        shift = tl.where(new == -float("inf"), 0.0, new)
        summed = summed * tl.exp(highest - shift) + found * tl.exp(largest - shift)
        highest = new
        place += rows
    return tl.where(summed == 0.0, -float("inf"), highest + tl.log(summed))


@triton.jit(do_not_specialize=["parts", "rows", "lowest"])
def finish_rows_kernel(
    maximum,
    total,
    target_cosine,
    targets,
    losses,
    state,
    parts,
    rows,
    lowest,
    parameters,
    POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses (rows,) and state (3, rows) from (parts, rows) statistics, see ``logsumexp.py``.

    A row has a target if its label is neither -1 (it is ignored) nor below ``lowest``.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < rows
    log_negatives = log_of_sums(maximum, total, i, mask, parts, rows, BLOCK)
    target = tl.load(targets + i, mask=mask, other=-1)
    cosine = tl.load(target_cosine + i, mask=mask, other=0.0)
    logit, slope = POSITIVE(cosine, parameters)
    gap = log_negatives - logit
    softplus, sigmoid = softplus_and_sigmoid(gap)
    has_target = (target >= lowest) & (target != -1)
    loss = tl.where(has_target, softplus, log_negatives)
    tl.store(losses + i, tl.where(target == -1, 0.0, loss), mask=mask)
    tl.store(state + i, log_negatives, mask=mask)
    tl.store(state + rows + i, tl.where(has_target, sigmoid, 1.0), mask=mask)
    tl.store(state + 2 * rows + i, slope, mask=mask)
