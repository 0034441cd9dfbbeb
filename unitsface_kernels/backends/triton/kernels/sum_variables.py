"""Kernel of ``sum`` losses whose formula reads variables: the two directions of a pair differ."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import column_subtiles, cosine_tile, pair_block, store_gradient
from .variables import (
    plus_slopes,
    scalar_values,
    store_column_sums,
    store_row_sums,
    values_at,
    zero_tiles,
)

#: Places in what a policy's function returns: value and derivatives by cosine and threshold, and
#: by the variables in their order.
_THRESHOLD = tl.constexpr(2)
_VARIABLES = tl.constexpr(3)


@triton.jit(do_not_specialize=["rows", "columns", "diagonal", "row_stride", "column_stride"])
def sum_variables_kernel(
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
    gradient,
    gradient_stride,
    gradient_scale,
    parameters,
    PAIR: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_THRESHOLD: tl.constexpr,
    PER_COLUMN: tl.constexpr,
    SLOPES: tl.constexpr,
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

    Pair (i, j) reads ``scalars`` (SCALARS,), ``a_rows`` (ROWS, rows) at i and ``b_columns``
    (COLUMNS, columns) at j; in the other direction ``b_rows`` (ROWS, columns) at j and
    ``a_columns`` (COLUMNS, rows) at i. Losses and, with SLOPES, weighted derivatives, each written
    once, for the caller to add up in a fixed order; a stretch is a subtile of a block:

    - ``of_scalars`` (1 + SCALARS, programs): by the threshold, if there is ONE_THRESHOLD for all
      pairs (else without its row), and by scalars, of both directions;
    - ``of_a_rows`` (1 + ROWS, column stretches, rows): sums over columns of the loss, and of
      derivatives by variables of rows; ``of_b_rows`` (1 + ROWS, row stretches, columns): sums over
      rows of the other direction;
    - ``of_b_columns`` (1 + COLUMNS, row stretches, columns): by the threshold, if it is
      PER_COLUMN (else without its row), and by variables of columns; ``of_a_columns``
      (1 + COLUMNS, column stretches, rows): of the other direction.
    """
    program = tl.program_id(0)
    row_block, column_block = pair_block(
        program, rows, columns, BLOCK_M, BLOCK_N, GROUP_M, TRIANGLE
    )
    # Whether sums have the other direction, and whether anything has.
    BACK: tl.constexpr = BOTH or TRIANGLE
    TWO: tl.constexpr = BACK or MIRRORED
    ALIKE: tl.constexpr = ROWS + COLUMNS == 0 and not PER_COLUMN
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
    of_all = scalar_values(scalars, SCALARS)
    i_rows = values_at(a_rows, row_stride, i, in_rows, 1, ROWS)
    i_weight = 1.0
    if a_weights is not None:
        i_weight = tl.load(a_weights + i, mask=in_rows, other=0.0)[:, None]
    if TWO:
        i_columns = values_at(a_columns, column_stride, i, in_rows, 1, COLUMNS)
    if not PER_COLUMN:
        threshold = tl.load(b_threshold)
        i_threshold = threshold
    elif TWO:
        i_threshold = tl.load(a_threshold + i, mask=i_label >= 0, other=0.0)[:, None]
    factor = 1.0
    if gradient_scale is not None:
        factor = tl.load(gradient_scale)
    # Losses, variables of rows and of columns have sums over the same stretch.
    row_plane = tl.cdiv(columns, BLOCK_N).to(tl.int64) * EPILOGUE_SUBTILES * rows
    column_plane = tl.cdiv(rows, BLOCK_M).to(tl.int64) * EPILOGUE_SUBTILES * columns

    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    FIRST: tl.constexpr = _THRESHOLD if ONE_THRESHOLD else _VARIABLES
    NUMBERS: tl.constexpr = SCALARS + ONE_THRESHOLD
    BY_ROWS: tl.constexpr = _VARIABLES + SCALARS
    BY_COLUMNS: tl.constexpr = BY_ROWS + ROWS
    totals = zero_tiles(BLOCK_M, NUMBERS)
    stretches = tl.arange(0, EPILOGUE_SUBTILES)
    subtiles = column_subtiles(cosine, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        # A branch keeps subtiles apart, as in ``sum_total_kernel``. Past the end are no stretches.
        if column + subtile * WIDTH < columns:
            j = column + subtile * WIDTH + tl.arange(0, WIDTH)
            in_columns = j < columns
            stretch_mask = in_columns[None, :]
            row_out = (column_block * EPILOGUE_SUBTILES + subtile).to(tl.int64) * rows + i
            column_out = (row_block * EPILOGUE_SUBTILES + stretches).to(tl.int64)[
                :, None
            ] * columns + j[None, :]
            j_label = tl.load(b_labels + j, mask=in_columns, other=-1)
            valid = (i_label >= 0)[:, None] & (j_label >= 0)[None, :]
            if EXCLUDE:
                valid &= (i + diagonal)[:, None] != j[None, :]
            positive = i_label[:, None] == j_label[None, :]
            j_columns = values_at(b_columns, column_stride, j, in_columns, 0, COLUMNS)
            if PER_COLUMN:
                j_threshold = tl.load(b_threshold + j, mask=j_label >= 0, other=0.0)[None, :]
            else:
                j_threshold = threshold
            forth = PAIR(
                subtiles[subtile], j_threshold, positive, parameters, of_all + i_rows + j_columns
            )
            total = tl.where(valid, forth[1] * i_weight, 0.0)
            store_row_sums(of_a_rows + row_out, forth, valid, 1.0, 0, in_rows, 0, 1)
            if SLOPES:
                totals = plus_slopes(totals, forth, valid, i_weight, FIRST, NUMBERS)
                store_row_sums(
                    of_a_rows + row_plane + row_out, forth, valid, i_weight, row_plane, in_rows,
                    BY_ROWS, ROWS,
                )  # fmt: skip
            if of_b_columns is not None:
                out = of_b_columns + column_out
                if PER_COLUMN:
                    store_column_sums(out, forth, valid, i_weight, 0, stretch_mask, _THRESHOLD, 1)
                    out += column_plane
                store_column_sums(
                    out, forth, valid, i_weight, column_plane, stretch_mask, BY_COLUMNS, COLUMNS
                )
            if TWO:
                j_weight = 1.0
                if b_weights is not None:
                    j_weight = tl.load(b_weights + j, mask=in_columns, other=0.0)[None, :]
                if ALIKE:
                    back = forth
                else:
                    j_rows = values_at(b_rows, row_stride, j, in_columns, 0, ROWS)
                    back = PAIR(
                        subtiles[subtile], i_threshold, positive, parameters,
                        of_all + j_rows + i_columns,
                    )  # fmt: skip
                total += tl.where(valid, back[1] * j_weight, 0.0)
                if BACK:
                    if SLOPES:
                        # A block on the diagonal has each pair twice already.
                        share = tl.where(above, j_weight, 0.0) if TRIANGLE else j_weight
                        totals = plus_slopes(totals, back, valid, share, FIRST, NUMBERS)
                    if above:
                        store_column_sums(
                            of_b_rows + column_out, back, valid, 1.0, 0, stretch_mask, 0, 1
                        )
                        if SLOPES:
                            store_column_sums(
                                of_b_rows + column_plane + column_out, back, valid, j_weight,
                                column_plane, stretch_mask, BY_ROWS, ROWS,
                            )  # fmt: skip
                        if of_a_columns is not None:
                            back_out = of_a_columns + row_out
                            if PER_COLUMN:
                                store_row_sums(
                                    back_out, back, valid, j_weight, 0, in_rows, _THRESHOLD, 1
                                )
                                back_out += row_plane
                            store_row_sums(
                                back_out, back, valid, j_weight, row_plane, in_rows,
                                BY_COLUMNS, COLUMNS,
                            )  # fmt: skip
            if gradient is not None:
                store_gradient(
                    gradient, gradient_stride, total * factor, row, column, i, j, rows, columns,
                    above, TRIANGLE,
                )  # fmt: skip
    if SLOPES:
        for k in tl.static_range(NUMBERS):
            place = k * tl.num_programs(0) + program
            tl.store(of_scalars + place, tl.sum(totals[k]))
