"""Kernels of log-sum-exp losses over samples: statistics of negatives and of positives.

Common arguments: ``rows`` unit rows ``a`` against ``columns`` unit rows ``b``, labels below 0 take
no part. TRIANGLE: the tile is its own mirror image; only blocks on and above the diagonal have a
program, and what those above it find for their columns fills the places of those below. BOTH: in
any other tile, pairs count in both directions. EXCLUDE: the pair (i, i + ``diagonal``) is left out.
Variables: as of ``sum_variables_kernel``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..losses.math import softplus_and_sigmoid
from .tiles import column_subtiles, cosine_tile, pair_block
from .variables import keeps_apart, logits_of, scalar_values, values_at

#: exp2 is one instruction; exp would add the multiplication and a guard for denormals.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _log_sum(logit, AXIS: tl.constexpr):
    """Maximum and sum of exp(logit - maximum) along an axis; NaN is carried by the sum."""
    maximum = tl.max(logit, axis=AXIS)
    # Without negatives the maximum is -inf, and -inf - -inf would be NaN.
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = tl.sum(tl.exp2((logit - tl.expand_dims(shift, AXIS)) * LOG2_E), axis=AXIS)
    return maximum, total


@triton.jit
def _log_sums(logit, positive, AXIS: tl.constexpr):
    """:func:`_log_sum` of the negatives, and of the positives, with one exponential per pair."""
    maximum = tl.max(tl.where(positive, -float("inf"), logit), axis=AXIS)
    positive_maximum = tl.max(tl.where(positive, logit, -float("inf")), axis=AXIS)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    positive_shift = tl.where(positive_maximum == -float("inf"), 0.0, positive_maximum)
    own_shift = tl.where(
        positive, tl.expand_dims(positive_shift, AXIS), tl.expand_dims(shift, AXIS)
    )
    e = tl.exp2((logit - own_shift) * LOG2_E)
    total = tl.sum(tl.where(positive, 0.0, e), axis=AXIS)
    positive_total = tl.sum(tl.where(positive, e, 0.0), axis=AXIS)
    return maximum, total, positive_maximum, positive_total


@triton.jit
def pair_terms(
    cosine,
    same,
    parameters,
    variables,
    NEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Logits of pairs, of positives where they are of the ``same`` identity and there is POSITIVE,
    and their derivatives by cosine and by each of COUNT variables.
    """
    terms = logits_of(NEGATIVE, cosine, parameters, variables, COUNT)
    if POSITIVE is None:
        return terms
    else:
        own = logits_of(POSITIVE, cosine, parameters, variables, COUNT)
        found = ()
        for k in tl.static_range(2 + COUNT):
            found += (tl.where(same, own[k], terms[k]),)  # type: ignore[assignment]
        return found


@triton.jit(do_not_specialize=["rows", "columns", "diagonal", "row_stride", "column_stride"])
def pair_negatives_kernel(
    a,
    b,
    a_stride,
    b_stride,
    rows,
    columns,
    DEPTH: tl.constexpr,
    diagonal,
    a_labels,
    b_labels,
    row_maximum,
    row_total,
    row_positive_maximum,
    row_positive_total,
    column_maximum,
    column_total,
    column_positive_maximum,
    column_positive_total,
    scalars,
    a_rows,
    b_rows,
    row_stride,
    a_columns,
    b_columns,
    column_stride,
    parameters,
    NEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BOTH: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Per stretch: largest negative logit and sum of exp(logit - largest).

    ``row_maximum``, ``row_total``: (column blocks * EPILOGUE_SUBTILES, rows); ``column_maximum``,
    ``column_total``: (row blocks * EPILOGUE_SUBTILES, columns), or None. The same of positives if
    there is room for it; POSITIVE is None where they take no part.
    """
    row_block, column_block = pair_block(
        tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M, TRIANGLE
    )
    row = row_block * BLOCK_M
    column = column_block * BLOCK_N
    cosine = cosine_tile(
        a, b, a_stride, b_stride, row, column, rows, columns, DEPTH,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    above = (row_block != column_block) if TRIANGLE else BOTH
    i = row + tl.arange(0, BLOCK_M)
    in_rows = i < rows
    # Past the end is as good as ignored.
    i_label = tl.load(a_labels + i, mask=in_rows, other=-1)
    of_all = scalar_values(scalars, SCALARS)
    i_rows = values_at(a_rows, row_stride, i, in_rows, 1, ROWS)
    COUNT: tl.constexpr = SCALARS + ROWS + COLUMNS
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    HEIGHT: tl.constexpr = BLOCK_M // EPILOGUE_SUBTILES
    stretches = tl.arange(0, EPILOGUE_SUBTILES)
    subtiles = column_subtiles(cosine, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        if COUNT == 0 or keeps_apart(rows, subtile, EPILOGUE_SUBTILES):
            j = column + subtile * WIDTH + tl.arange(0, WIDTH)
            in_columns = j < columns
            j_label = tl.load(b_labels + j, mask=in_columns, other=-1)
            counted = (i_label >= 0)[:, None] & (j_label >= 0)[None, :]
            if POSITIVE is None:
                counted &= i_label[:, None] != j_label[None, :]
            if EXCLUDE:
                counted &= (i + diagonal)[:, None] != j[None, :]
            same = i_label[:, None] == j_label[None, :]
            j_columns = values_at(b_columns, column_stride, j, in_columns, 0, COLUMNS)
            logit = pair_terms(
                subtiles[subtile], same, parameters, of_all + i_rows + j_columns,
                NEGATIVE, POSITIVE, COUNT,
            )[0]  # fmt: skip
            logit = tl.where(counted, logit, -float("inf"))
            row_out = (column_block * EPILOGUE_SUBTILES + subtile).to(tl.int64) * rows + i
            if row_positive_maximum is None:
                maximum, total = _log_sum(logit, 1)
            else:
                maximum, total, positive_maximum, positive_total = _log_sums(logit, same, 1)
                tl.store(row_positive_maximum + row_out, positive_maximum, mask=in_rows)
                tl.store(row_positive_total + row_out, positive_total, mask=in_rows)
            tl.store(row_maximum + row_out, maximum, mask=in_rows)
            tl.store(row_total + row_out, total, mask=in_rows)
            # The outer condition is known to the compiler, the inner one may not be.
            if column_maximum is not None:  # noqa: SIM102
                if above:
                    back = logit
                    if ROWS + COLUMNS > 0:
                        j_rows = values_at(b_rows, row_stride, j, in_columns, 0, ROWS)
                        i_columns = values_at(a_columns, column_stride, i, in_rows, 1, COLUMNS)
                        back = pair_terms(
                            subtiles[subtile], same, parameters, of_all + j_rows + i_columns,
                            NEGATIVE, POSITIVE, COUNT,
                        )[0]  # fmt: skip
                        back = tl.where(counted, back, -float("inf"))
                    stacked = tl.reshape(back, (EPILOGUE_SUBTILES, HEIGHT, WIDTH))
                    out = (row_block * EPILOGUE_SUBTILES + stretches).to(tl.int64)[
                        :, None
                    ] * columns + j[None, :]
                    if column_positive_maximum is None:
                        other_maximum, other_total = _log_sum(stacked, 1)
                    else:
                        stacked_same = tl.reshape(same, (EPILOGUE_SUBTILES, HEIGHT, WIDTH))
                        other_maximum, other_total, other_own_maximum, other_own_total = _log_sums(
                            stacked, stacked_same, 1
                        )
                        inside = in_columns[None, :]
                        tl.store(column_positive_maximum + out, other_own_maximum, mask=inside)
                        tl.store(column_positive_total + out, other_own_total, mask=inside)
                    tl.store(column_maximum + out, other_maximum, mask=in_columns[None, :])
                    tl.store(column_total + out, other_total, mask=in_columns[None, :])


@triton.jit(do_not_specialize=["rows", "columns", "diagonal", "row_stride", "column_stride"])
def pair_positives_kernel(
    a,
    b,
    a_stride,
    b_stride,
    rows,
    columns,
    DEPTH: tl.constexpr,
    diagonal,
    a_labels,
    b_labels,
    a_log_negatives,
    b_log_negatives,
    row_loss,
    row_sigmoid,
    column_loss,
    column_sigmoid,
    scalars,
    a_rows,
    b_rows,
    row_stride,
    a_columns,
    b_columns,
    column_stride,
    parameters,
    POSITIVE: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BOTH: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Per stretch: sums over positives of softplus and sigmoid of (log_negatives - logit).

    Shapes of results: as of :func:`pair_negatives_kernel`.
    """
    row_block, column_block = pair_block(
        tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M, TRIANGLE
    )
    row = row_block * BLOCK_M
    column = column_block * BLOCK_N
    cosine = cosine_tile(
        a, b, a_stride, b_stride, row, column, rows, columns, DEPTH,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    above = (row_block != column_block) if TRIANGLE else BOTH
    i = row + tl.arange(0, BLOCK_M)
    in_rows = i < rows
    i_label = tl.load(a_labels + i, mask=in_rows, other=-1)
    i_negatives = tl.load(a_log_negatives + i, mask=in_rows, other=0.0)
    of_all = scalar_values(scalars, SCALARS)
    i_rows = values_at(a_rows, row_stride, i, in_rows, 1, ROWS)
    COUNT: tl.constexpr = SCALARS + ROWS + COLUMNS
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    HEIGHT: tl.constexpr = BLOCK_M // EPILOGUE_SUBTILES
    stretches = tl.arange(0, EPILOGUE_SUBTILES)
    subtiles = column_subtiles(cosine, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        if COUNT == 0 or keeps_apart(rows, subtile, EPILOGUE_SUBTILES):
            j = column + subtile * WIDTH + tl.arange(0, WIDTH)
            in_columns = j < columns
            j_label = tl.load(b_labels + j, mask=in_columns, other=-1)
            counted = (i_label >= 0)[:, None] & (i_label[:, None] == j_label[None, :])
            if EXCLUDE:
                counted &= (i + diagonal)[:, None] != j[None, :]
            j_columns = values_at(b_columns, column_stride, j, in_columns, 0, COLUMNS)
            logit = pair_terms(
                subtiles[subtile], counted, parameters, of_all + i_rows + j_columns,
                POSITIVE, None, COUNT,
            )[0]  # fmt: skip
            # Far above every log-sum-exp: both results are 0, without a selection of each.
            logit = tl.where(counted, logit, float("inf"))
            value, sigmoid = softplus_and_sigmoid(i_negatives[:, None] - logit)
            row_out = (column_block * EPILOGUE_SUBTILES + subtile).to(tl.int64) * rows + i
            tl.store(row_loss + row_out, tl.sum(value, axis=1), mask=in_rows)
            tl.store(row_sigmoid + row_out, tl.sum(sigmoid, axis=1), mask=in_rows)
            if column_loss is not None:  # noqa: SIM102
                if above:
                    j_negatives = tl.load(b_log_negatives + j, mask=in_columns, other=0.0)
                    back = logit
                    if ROWS + COLUMNS > 0:
                        j_rows = values_at(b_rows, row_stride, j, in_columns, 0, ROWS)
                        i_columns = values_at(a_columns, column_stride, i, in_rows, 1, COLUMNS)
                        back = pair_terms(
                            subtiles[subtile], counted, parameters, of_all + j_rows + i_columns,
                            POSITIVE, None, COUNT,
                        )[0]  # fmt: skip
                        back = tl.where(counted, back, float("inf"))
                    losses, sigmoids = softplus_and_sigmoid(j_negatives[None, :] - back)
                    losses = tl.reshape(losses, (EPILOGUE_SUBTILES, HEIGHT, WIDTH))
                    sigmoids = tl.reshape(sigmoids, (EPILOGUE_SUBTILES, HEIGHT, WIDTH))
                    out = (row_block * EPILOGUE_SUBTILES + stretches).to(tl.int64)[
                        :, None
                    ] * columns + j[None, :]
                    tl.store(column_loss + out, tl.sum(losses, axis=1), mask=in_columns[None, :])
                    tl.store(
                        column_sigmoid + out, tl.sum(sigmoids, axis=1), mask=in_columns[None, :]
                    )
