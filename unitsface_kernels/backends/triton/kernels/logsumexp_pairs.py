"""Kernels of log-sum-exp losses over samples: negatives, positives, and gradient tiles.

Common arguments: ``rows`` unit rows ``a`` against ``columns`` unit rows ``b``, labels below 0 take
no part. TRIANGLE: the tile is its own mirror image; only blocks on and above the diagonal have a
program, and what those above it find for their columns fills the places of those below. BOTH: in
any other tile, pairs count in both directions. EXCLUDE: the pair (i, i + ``diagonal``) is left out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..losses.math import softplus_and_sigmoid
from .tiles import column_subtiles, cosine_tile, pair_block, store_gradient

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


@triton.jit(do_not_specialize=["rows", "columns", "diagonal"])
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
    parameters,
    NEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr,
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
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    HEIGHT: tl.constexpr = BLOCK_M // EPILOGUE_SUBTILES
    stretches = tl.arange(0, EPILOGUE_SUBTILES)
    subtiles = column_subtiles(cosine, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        j = column + subtile * WIDTH + tl.arange(0, WIDTH)
        in_columns = j < columns
        j_label = tl.load(b_labels + j, mask=in_columns, other=-1)
        counted = (i_label >= 0)[:, None] & (j_label >= 0)[None, :]
        if POSITIVE is None:
            counted &= i_label[:, None] != j_label[None, :]
        if EXCLUDE:
            counted &= (i + diagonal)[:, None] != j[None, :]
        logit, _ = NEGATIVE(subtiles[subtile], parameters)
        same = i_label[:, None] == j_label[None, :]
        if POSITIVE is not None:
            own_logit, _ = POSITIVE(subtiles[subtile], parameters)
            logit = tl.where(same, own_logit, logit)
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
                stacked = tl.reshape(logit, (EPILOGUE_SUBTILES, HEIGHT, WIDTH))
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


@triton.jit(do_not_specialize=["rows", "columns", "diagonal"])
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
    parameters,
    POSITIVE: tl.constexpr,
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
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    HEIGHT: tl.constexpr = BLOCK_M // EPILOGUE_SUBTILES
    stretches = tl.arange(0, EPILOGUE_SUBTILES)
    subtiles = column_subtiles(cosine, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        j = column + subtile * WIDTH + tl.arange(0, WIDTH)
        in_columns = j < columns
        j_label = tl.load(b_labels + j, mask=in_columns, other=-1)
        counted = (i_label >= 0)[:, None] & (i_label[:, None] == j_label[None, :])
        if EXCLUDE:
            counted &= (i + diagonal)[:, None] != j[None, :]
        logit, _ = POSITIVE(subtiles[subtile], parameters)
        # Far above every log-sum-exp: both results are 0, without a selection of each.
        logit = tl.where(counted, logit, float("inf"))
        value, sigmoid = softplus_and_sigmoid(i_negatives[:, None] - logit)
        row_out = (column_block * EPILOGUE_SUBTILES + subtile).to(tl.int64) * rows + i
        tl.store(row_loss + row_out, tl.sum(value, axis=1), mask=in_rows)
        tl.store(row_sigmoid + row_out, tl.sum(sigmoid, axis=1), mask=in_rows)
        if column_loss is not None:  # noqa: SIM102
            if above:
                j_negatives = tl.load(b_log_negatives + j, mask=in_columns, other=0.0)
                value, sigmoid = softplus_and_sigmoid(j_negatives[None, :] - logit)
                values = tl.sum(tl.reshape(value, (EPILOGUE_SUBTILES, HEIGHT, WIDTH)), axis=1)
                sigmoids = tl.sum(tl.reshape(sigmoid, (EPILOGUE_SUBTILES, HEIGHT, WIDTH)), axis=1)
                out = (row_block * EPILOGUE_SUBTILES + stretches).to(tl.int64)[
                    :, None
                ] * columns + j[None, :]
                tl.store(column_loss + out, values, mask=in_columns[None, :])
                tl.store(column_sigmoid + out, sigmoids, mask=in_columns[None, :])


@triton.jit
def _direction(logit, positive, log_negatives, negative_weight, positive_weight, log_positives):
    """d loss / d logit of one direction of the pairs; one exponential serves both kinds.

    A negative has e^(z - N), a positive e^(z - P) or, where P is None,
    -sigmoid(N - z) = -1 / (1 + e^(z - N)).
    """
    if log_positives is None:
        e = tl.exp2((logit - log_negatives) * LOG2_E)
        # A division would bring guards for ranges that cannot occur here.
        root = tl.rsqrt(1.0 + e)
        # One choice of weights first: two finished results to choose from take more registers.
        weight = tl.where(positive, -positive_weight, negative_weight)
        return weight * tl.where(positive, root * root, e)
    else:
        own = tl.where(positive, log_positives, log_negatives)
        weight = tl.where(positive, positive_weight, negative_weight)
        return weight * tl.exp2((logit - own) * LOG2_E)


@triton.jit(do_not_specialize=["rows", "columns", "diagonal"])
def pair_gradient_kernel(
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
    a_negative,
    a_positive,
    a_log_positives,
    b_log_negatives,
    b_negative,
    b_positive,
    b_log_positives,
    gradient,
    gradient_stride,
    gradient_scale,
    parameters,
    NEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr,
    TRIANGLE: tl.constexpr,
    MIRRORED: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d loss / d cosine of a tile, times ``gradient_scale`` (1,) or 1 if that is None.

    MIRRORED: of both directions of each pair, with the ``b_`` vectors. POSITIVE may be None, and
    ``a_log_positives`` and ``b_log_positives`` are, where positives have no log-sum-exp.
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
    i = row + tl.arange(0, BLOCK_M)
    in_rows = i < rows
    i_label = tl.load(a_labels + i, mask=in_rows, other=-1)
    i_log = tl.load(a_log_negatives + i, mask=in_rows, other=0.0)[:, None]
    i_negative = tl.load(a_negative + i, mask=in_rows, other=0.0)[:, None]
    i_positive = tl.load(a_positive + i, mask=in_rows, other=0.0)[:, None]
    i_log_positives = None
    if a_log_positives is not None:
        i_log_positives = tl.load(a_log_positives + i, mask=in_rows, other=0.0)[:, None]
    factor = 1.0
    if gradient_scale is not None:
        factor = tl.load(gradient_scale)
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    subtiles = column_subtiles(cosine, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        j = column + subtile * WIDTH + tl.arange(0, WIDTH)
        in_columns = j < columns
        j_label = tl.load(b_labels + j, mask=in_columns, other=-1)
        same = i_label[:, None] == j_label[None, :]
        counted = (i_label >= 0)[:, None] & (j_label >= 0)[None, :]
        if EXCLUDE:
            counted &= (i + diagonal)[:, None] != j[None, :]
        logit, slope = NEGATIVE(subtiles[subtile], parameters)
        if POSITIVE is None:
            counted &= i_label[:, None] != j_label[None, :]
        else:
            own_logit, own_slope = POSITIVE(subtiles[subtile], parameters)
            logit = tl.where(same, own_logit, logit)
            slope = tl.where(same, own_slope, slope)
        total = _direction(logit, same, i_log, i_negative, i_positive, i_log_positives)
        if MIRRORED:
            j_log = tl.load(b_log_negatives + j, mask=in_columns, other=0.0)[None, :]
            j_negative = tl.load(b_negative + j, mask=in_columns, other=0.0)[None, :]
            j_positive = tl.load(b_positive + j, mask=in_columns, other=0.0)[None, :]
            j_log_positives = None
            if b_log_positives is not None:
                j_log_positives = tl.load(b_log_positives + j, mask=in_columns, other=0.0)[None, :]
            total += _direction(logit, same, j_log, j_negative, j_positive, j_log_positives)
        # Selected, not multiplied: the cosine of a pair left out may be NaN.
        total = tl.where(counted, total * slope * factor, 0.0)
        store_gradient(
            gradient, gradient_stride, total, row, column, i, j, rows, columns,
            row_block != column_block, TRIANGLE,
        )  # fmt: skip
