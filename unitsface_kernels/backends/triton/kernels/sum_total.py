"""Kernel of ``sum`` losses whose rows are wanted as one total: GEMM, policy and gradient.

Without a sum per row and per column, no result of a pair leaves its thread but the gradient, and
softplus takes one logarithm for many pairs: sum log(1 + e) = log prod(1 + e). Terms of any other
kind are added as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..losses.math import exponential_and_sigmoid, log1p, log1p_of_both
from .tiles import added, column_subtiles, cosine_tile, folded, pair_block, store_gradient


@triton.jit(do_not_specialize=["rows", "columns", "diagonal"])
def sum_total_kernel(
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
    threshold,
    loss,
    d_threshold,
    gradient,
    gradient_stride,
    gradient_scale,
    weights,
    parameters,
    PAIR: tl.constexpr,
    TERMS: tl.constexpr,
    THRESHOLD_SLOPE: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BOTH: tl.constexpr,
    MIRRORED: tl.constexpr,
    EXCLUDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of a tile; arguments without a note as of ``sum_kernel``.

    Adds the loss of its pairs to its place in ``loss`` (programs,), and the gradient of the
    ``threshold`` (1,) in ``d_threshold``, if that is wanted: launches follow one another, so
    that the order of the additions is fixed. A pair that counts in both directions counts twice.
    """
    program = tl.program_id(0)
    row_block, column_block = pair_block(
        program, rows, columns, BLOCK_M, BLOCK_N, GROUP_M, TRIANGLE
    )
    above = (row_block != column_block) if TRIANGLE else BOTH
    row = row_block * BLOCK_M
    column = column_block * BLOCK_N
    cosine = cosine_tile(
        a, b, a_stride, b_stride, row, column, rows, columns, DEPTH,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip

    i = row + tl.arange(0, BLOCK_M)
    # Past the end is as good as ignored.
    i_label = tl.load(a_labels + i, mask=i < rows, other=-1)
    i_valid = (i_label >= 0)[:, None]
    b_of_all = tl.load(threshold)
    factor = 2.0 if MIRRORED else 1.0
    if gradient_scale is not None:
        factor *= tl.load(gradient_scale)
    # An ignored row's pairs are like any other's, but for this.
    i_factor = tl.where(i_valid, factor, 0.0)
    if EXCLUDE:
        crossed = (row + diagonal < column + BLOCK_N) & (column < row + diagonal + BLOCK_M)

    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    # A product has BLOCK_N / 4 factors of at most 2.
    tl.static_assert(BLOCK_N <= 256)
    tops = tl.zeros((BLOCK_M, 4), dtype=tl.float32)
    products = tops
    positive_products = tops
    slopes = tops
    subtiles = column_subtiles(cosine, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        # A branch also keeps the compiler from working on all subtiles at a time, which would take
        # more registers than there are.
        if column + subtile * WIDTH < columns:
            j = column + subtile * WIDTH + tl.arange(0, WIDTH)
            j_label = tl.load(b_labels + j, mask=j < columns, other=-1)
            positive = i_label[:, None] == j_label[None, :]
            if TERMS:
                value, slope, by_threshold = PAIR(subtiles[subtile], b_of_all, positive, parameters)
                valid = i_valid & (j_label >= 0)[None, :]
                if EXCLUDE:  # noqa: SIM102
                    if crossed:
                        valid &= (i + diagonal)[:, None] != j[None, :]
                tops += folded(tl.where(valid, value, 0.0), added)
                if d_threshold is not None:
                    slopes += folded(tl.where(valid, by_threshold, 0.0), added)
                by_cosine = tl.where(valid, slope, 0.0) * factor
            else:
                logit, slope = PAIR(subtiles[subtile], b_of_all, positive, parameters)
                logit = tl.where(positive, -logit, logit)
                logit = tl.where((j_label >= 0)[None, :], logit, -float("inf"))
                if EXCLUDE:  # noqa: SIM102
                    if crossed:
                        left_out = (i + diagonal)[:, None] == j[None, :]
                        logit = tl.where(left_out, -float("inf"), logit)
                e, d_logit = exponential_and_sigmoid(logit, tl.where(positive, -1.0, 1.0))
                top = tl.maximum(logit, 0.0)
                if weights is not None:
                    # A weight cannot enter a product: positives have their own.
                    weight = tl.where(positive, weights[0], weights[1])
                    top *= weight
                    d_logit *= weight
                    of_positives = folded(tl.where(positive, e, 0.0), log1p_of_both)
                    positive_products = log1p_of_both(positive_products, of_positives)
                    e = tl.where(positive, 0.0, e)
                tops += folded(top, added)
                products = log1p_of_both(products, folded(e, log1p_of_both))
                if d_threshold is not None:
                    slopes += folded(d_logit, added)
                by_cosine = d_logit * (slope * i_factor)
            if gradient is not None:
                store_gradient(
                    gradient, gradient_stride, by_cosine, row, column, i, j, rows, columns,
                    above, TRIANGLE,
                )  # fmt: skip

    directions = tl.where(above, 2.0, 1.0)
    if TERMS:
        of_block = tl.sum(tops) * directions
    else:
        logs = log1p(products)
        if weights is not None:
            logs = weights[1] * logs + weights[0] * log1p(positive_products)
        of_block = tl.sum(tl.where(i_valid, tops + logs, 0.0)) * directions
    tl.store(loss + program, tl.load(loss + program) + of_block)
    if d_threshold is not None:
        slope_of_block = tl.sum(tl.where(i_valid, slopes, 0.0)) * (directions * THRESHOLD_SLOPE)
        tl.store(d_threshold + program, tl.load(d_threshold + program) + slope_of_block)
