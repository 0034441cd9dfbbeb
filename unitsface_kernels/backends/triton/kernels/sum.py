"""Kernel of ``sum`` losses: GEMM, policy, reductions and gradient of a tile in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from ..losses.math import softplus_and_sigmoid
from .tiles import column_subtiles, cosine_tile, pair_block, store_gradient


@triton.jit
def _terms(
    cosine,
    threshold,
    positive,
    valid,
    weights,
    parameters,
    PAIR: tl.constexpr,
    TERMS: tl.constexpr,
    THRESHOLD_SLOPE: tl.constexpr,
):
    """Value of each pair and its derivatives by cosine and threshold; 0 where not ``valid``."""
    if TERMS:
        value, slope, by_threshold = PAIR(cosine, threshold, positive, parameters)
        value = tl.where(valid, value, 0.0)
        return value, tl.where(valid, slope, 0.0), tl.where(valid, by_threshold, 0.0)
    else:
        logit, slope = PAIR(cosine, threshold, positive, parameters)
        logit = tl.where(valid, tl.where(positive, -logit, logit), -float("inf"))
        value, share = softplus_and_sigmoid(logit)
        if weights is not None:
            weight = tl.where(positive, weights[0], weights[1])
            value *= weight
            share *= weight
        share = tl.where(positive, -share, share)
        return value, share * slope, share * THRESHOLD_SLOPE


@triton.jit(do_not_specialize=["rows", "columns", "diagonal"])
def sum_kernel(
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
    a_threshold,
    b_threshold,
    a_weights,
    b_weights,
    row_loss,
    column_loss,
    row_threshold,
    column_threshold,
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
    PER_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) block of a tile that compares ``rows`` with ``columns``.

    Per-block results, each written once, for the caller to add up in a fixed order; each may be
    None when it is not wanted:

    - ``row_loss`` (column blocks, rows): sums over the block's columns, pair taken as (i, j);
    - ``column_loss`` (row blocks, columns): sums over the block's rows, pair taken as (j, i);
    - ``column_threshold`` (row blocks, columns) and ``row_threshold`` (column blocks, rows): the
      same for weighted d loss / d threshold, with a threshold per column. With one threshold for
      all pairs ``row_threshold`` is (column blocks, rows) with both directions of the pair;
    - ``gradient`` (rows, gradient_stride): d loss / d cosine, times ``gradient_scale`` (1,).

    TRIANGLE: the tile is its own mirror image; only blocks on and above the diagonal have a
    program, those above it count in both directions and write their gradient to both places.
    BOTH: in any other tile, pairs count in both directions. MIRRORED (implied by the other two):
    a gradient holds both directions of its pair.
    EXCLUDE: the pair (i, i + ``diagonal``) is left out.
    ``weights``: of positive and of negative pairs; None: 1.
    PAIR: the function of a ``SumPolicy`` or, with TERMS, of a ``SumTermsPolicy``.
    """
    row_block, column_block = pair_block(
        tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, GROUP_M, TRIANGLE
    )
    above = (row_block != column_block) if TRIANGLE else BOTH
    row = row_block * BLOCK_M
    column = column_block * BLOCK_N
    cosine = cosine_tile(
        a, b, a_stride, b_stride, row, column, rows, columns, DEPTH,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip

    i = row + tl.arange(0, BLOCK_M)
    in_rows = i < rows
    # Past the end is as good as ignored.
    i_label = tl.load(a_labels + i, mask=in_rows, other=-1)
    i_weight = 1.0
    if a_weights is not None:
        i_weight = tl.load(a_weights + i, mask=in_rows, other=0.0)[:, None]
    if not PER_COLUMN:
        threshold = tl.load(b_threshold)
    elif BOTH or MIRRORED:
        i_threshold = tl.load(a_threshold + i, mask=i_label >= 0, other=0.0)[:, None]
    factor = 1.0
    if gradient_scale is not None:
        factor = tl.load(gradient_scale)

    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    HEIGHT: tl.constexpr = BLOCK_M // EPILOGUE_SUBTILES
    stretches = tl.arange(0, EPILOGUE_SUBTILES)
    subtiles = column_subtiles(cosine, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        j = column + subtile * WIDTH + tl.arange(0, WIDTH)
        in_columns = j < columns
        row_out = (column_block * EPILOGUE_SUBTILES + subtile).to(tl.int64) * rows + i
        column_out = (row_block * EPILOGUE_SUBTILES + stretches).to(tl.int64)[
            :, None
        ] * columns + j[None, :]
        j_label = tl.load(b_labels + j, mask=in_columns, other=-1)
        valid = (i_label >= 0)[:, None] & (j_label >= 0)[None, :]
        if EXCLUDE:
            valid &= (i + diagonal)[:, None] != j[None, :]
        positive = i_label[:, None] == j_label[None, :]
        j_weight = 1.0
        if b_weights is not None:
            j_weight = tl.load(b_weights + j, mask=in_columns, other=0.0)[None, :]
        if PER_COLUMN:
            threshold = tl.load(b_threshold + j, mask=j_label >= 0, other=0.0)[None, :]
        value, slope, d_threshold = _terms(
            subtiles[subtile], threshold, positive, valid, weights, parameters,
            PAIR, TERMS, THRESHOLD_SLOPE,
        )  # fmt: skip
        tl.store(row_loss + row_out, tl.sum(value, axis=1), mask=in_rows)
        if column_threshold is not None:
            column_sums = tl.reshape(d_threshold * i_weight, (EPILOGUE_SUBTILES, HEIGHT, WIDTH))
            column_sums = tl.sum(column_sums, axis=1)
            tl.store(column_threshold + column_out, column_sums, mask=in_columns[None, :])
        if PER_COLUMN and (BOTH or MIRRORED):
            # The pair taken as (j, i) differs only in its threshold.
            value, back, d_threshold = _terms(
                subtiles[subtile], i_threshold, positive, valid, weights, parameters,
                PAIR, TERMS, THRESHOLD_SLOPE,
            )  # fmt: skip
        # Here and below: the outer condition is known to the compiler, the inner one may not be.
        if column_loss is not None:  # noqa: SIM102
            if above:
                losses = tl.sum(tl.reshape(value, (EPILOGUE_SUBTILES, HEIGHT, WIDTH)), axis=1)
                tl.store(column_loss + column_out, losses, mask=in_columns[None, :])
        # With one threshold both directions of a pair have the same derivatives.
        pair_weight = i_weight + j_weight if MIRRORED or BOTH else i_weight
        if row_threshold is not None:
            if PER_COLUMN:
                if above:
                    back_sums = tl.sum(d_threshold * j_weight, axis=1)
                    tl.store(row_threshold + row_out, back_sums, mask=in_rows)
            else:
                if TRIANGLE:
                    # A block on the diagonal has each pair twice already.
                    sums = tl.sum(d_threshold * pair_weight, axis=1) * tl.where(above, 1.0, 0.5)
                elif BOTH:
                    sums = tl.sum(d_threshold * pair_weight, axis=1)
                else:
                    sums = tl.sum(d_threshold * i_weight, axis=1)
                tl.store(row_threshold + row_out, sums, mask=in_rows)
        if gradient is not None:
            if PER_COLUMN and MIRRORED:
                total = slope * i_weight + back * j_weight
            else:
                total = slope * pair_weight
            store_gradient(
                gradient, gradient_stride, total * factor, row, column, i, j, rows, columns,
                above, TRIANGLE,
            )  # fmt: skip
