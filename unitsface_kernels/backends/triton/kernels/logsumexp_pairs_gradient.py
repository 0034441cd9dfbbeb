"""Kernel of the gradient tiles of log-sum-exp losses over samples."""

from __future__ import annotations

import triton
import triton.language as tl

from .logsumexp_pairs import LOG2_E, pair_terms
from .tiles import column_subtiles, cosine_tile, pair_block, store_gradient
from .variables import (
    keeps_apart,
    plus_slopes,
    scalar_values,
    store_column_sums,
    store_row_sums,
    values_at,
    zero_tiles,
)


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


@triton.jit(do_not_specialize=["rows", "columns", "diagonal", "row_stride", "column_stride"])
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
    scalars,
    a_rows,
    b_rows,
    row_stride,
    a_columns,
    b_columns,
    column_stride,
    of_scalars,
    of_a_rows,
    of_b_rows,
    of_a_columns,
    of_b_columns,
    parameters,
    NEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPES: tl.constexpr,
    BOTH: tl.constexpr,
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
    ``a_log_positives`` and ``b_log_positives`` are, where positives have no log-sum-exp. Variables,
    and sums of derivatives by them, as of ``sum_variables_kernel``, but for losses and thresholds;
    SLOPES: there are sums, with BOTH of both directions.
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
    COUNT: tl.constexpr = SCALARS + ROWS + COLUMNS
    ALIKE: tl.constexpr = ROWS + COLUMNS == 0
    BY_COLUMNS: tl.constexpr = 2 + SCALARS + ROWS
    of_all = scalar_values(scalars, SCALARS)
    i_rows = values_at(a_rows, row_stride, i, in_rows, 1, ROWS)
    if MIRRORED:
        i_columns = values_at(a_columns, column_stride, i, in_rows, 1, COLUMNS)
    if SLOPES:
        row_plane = tl.cdiv(columns, BLOCK_N).to(tl.int64) * EPILOGUE_SUBTILES * rows
        column_plane = tl.cdiv(rows, BLOCK_M).to(tl.int64) * EPILOGUE_SUBTILES * columns
        totals = zero_tiles(BLOCK_M, SCALARS)
        stretches = tl.arange(0, EPILOGUE_SUBTILES)
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    subtiles = column_subtiles(cosine, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        if COUNT == 0 or keeps_apart(rows, subtile, EPILOGUE_SUBTILES):
            j = column + subtile * WIDTH + tl.arange(0, WIDTH)
            in_columns = j < columns
            j_label = tl.load(b_labels + j, mask=in_columns, other=-1)
            same = i_label[:, None] == j_label[None, :]
            counted = (i_label >= 0)[:, None] & (j_label >= 0)[None, :]
            if EXCLUDE:
                counted &= (i + diagonal)[:, None] != j[None, :]
            if POSITIVE is None:
                counted &= i_label[:, None] != j_label[None, :]
            j_columns = values_at(b_columns, column_stride, j, in_columns, 0, COLUMNS)
            terms = pair_terms(
                subtiles[subtile], same, parameters, of_all + i_rows + j_columns,
                NEGATIVE, POSITIVE, COUNT,
            )  # fmt: skip
            share = _direction(terms[0], same, i_log, i_negative, i_positive, i_log_positives)
            total = share
            if SLOPES:
                row_out = (column_block * EPILOGUE_SUBTILES + subtile).to(tl.int64) * rows + i
                column_out = (row_block * EPILOGUE_SUBTILES + stretches).to(tl.int64)[
                    :, None
                ] * columns + j[None, :]
                totals = plus_slopes(totals, terms, counted, share, 2, SCALARS)
                if of_a_rows is not None:
                    store_row_sums(
                        of_a_rows + row_out, terms, counted, share, row_plane, in_rows,
                        2 + SCALARS, ROWS,
                    )  # fmt: skip
                if of_b_columns is not None:
                    store_column_sums(
                        of_b_columns + column_out, terms, counted, share, column_plane,
                        in_columns[None, :], BY_COLUMNS, COLUMNS,
                    )  # fmt: skip
            if MIRRORED:
                j_log = tl.load(b_log_negatives + j, mask=in_columns, other=0.0)[None, :]
                j_negative = tl.load(b_negative + j, mask=in_columns, other=0.0)[None, :]
                j_positive = tl.load(b_positive + j, mask=in_columns, other=0.0)[None, :]
                j_log_positives = None
                if b_log_positives is not None:
                    j_log_positives = tl.load(b_log_positives + j, mask=in_columns, other=0.0)
                    j_log_positives = j_log_positives[None, :]
                if ALIKE:
                    back = terms
                else:
                    j_rows = values_at(b_rows, row_stride, j, in_columns, 0, ROWS)
                    back = pair_terms(
                        subtiles[subtile], same, parameters, of_all + j_rows + i_columns,
                        NEGATIVE, POSITIVE, COUNT,
                    )  # fmt: skip
                other = _direction(back[0], same, j_log, j_negative, j_positive, j_log_positives)
                if ALIKE:
                    total += other
                else:
                    total = share * terms[1] + other * back[1]
                if SLOPES and (BOTH or TRIANGLE):
                    # A block on the diagonal has each pair twice already.
                    counted_back = counted & above if TRIANGLE else counted
                    totals = plus_slopes(totals, back, counted_back, other, 2, SCALARS)
                    if above:
                        if of_b_rows is not None:
                            store_column_sums(
                                of_b_rows + column_out, back, counted, other, column_plane,
                                in_columns[None, :], 2 + SCALARS, ROWS,
                            )  # fmt: skip
                        if of_a_columns is not None:
                            store_row_sums(
                                of_a_columns + row_out, back, counted, other, row_plane,
                                in_rows, BY_COLUMNS, COLUMNS,
                            )  # fmt: skip
            if ALIKE or not MIRRORED:
                total = total * terms[1]
            # Selected, not multiplied: the cosine of a pair left out may be NaN.
            total = tl.where(counted, total * factor, 0.0)
            store_gradient(
                gradient, gradient_stride, total, row, column, i, j, rows, columns,
                above, TRIANGLE,
            )  # fmt: skip
    if SLOPES:
        for k in tl.static_range(SCALARS):
            tl.store(of_scalars + k * tl.num_programs(0) + program, tl.sum(totals[k]))
