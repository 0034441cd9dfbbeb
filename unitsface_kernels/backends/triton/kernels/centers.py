"""Kernels of classes with several centers: the largest cosine of each class, and its gradient back
to the center that attains it. They are independent of the loss.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import cosine_tile, grouped_block


@triton.jit(do_not_specialize=["rows", "columns", "centers"])
def largest_kernel(
    a,
    b,
    a_stride,
    b_stride,
    rows,
    columns,
    DEPTH: tl.constexpr,
    centers,
    cosines,
    which,
    stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Largest cosines of unit rows ``a`` with ``columns`` classes, each ``centers`` rows of ``b``.

    ``cosines`` (rows, stride) float32 and ``which`` (rows, stride) uint8: the largest of each
    class, of equal ones the first; NaN is larger than every number.
    """
    row_blocks = tl.cdiv(rows, BLOCK_M)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    row_block, column_block = grouped_block(tl.program_id(0), row_blocks, column_blocks, GROUP_M)
    row = row_block * BLOCK_M
    column = column_block * BLOCK_N
    # The first centers of the classes are one matrix, the second ones another, and so on.
    step = b_stride * centers
    largest = cosine_tile(
        a, b, a_stride, step, row, column, rows, columns, DEPTH,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    at = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for center in range(1, centers):
        cosine = cosine_tile(
            a, b + center * b_stride, a_stride, step, row, column, rows, columns, DEPTH,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        larger = (cosine > largest) | ((cosine != cosine) & (largest == largest))
        largest = tl.where(larger, cosine, largest)
        at = tl.where(larger, center, at)
    i = row + tl.arange(0, BLOCK_M)
    j = column + tl.arange(0, BLOCK_N)
    place = i[:, None].to(tl.int64) * stride + j[None, :]
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    tl.store(cosines + place, largest, mask=inside)
    tl.store(which + place, at.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["rows", "columns", "centers"])
def spread_kernel(
    gradient,
    gradient_stride,
    which,
    which_stride,
    out,
    out_stride,
    rows,
    columns,
    centers,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out`` (rows, columns * centers): ``gradient`` (rows, columns) at the centers ``which``."""
    blocks = tl.cdiv(columns * centers, BLOCK)
    program = tl.program_id(0)
    i = (program // blocks) * ROWS + tl.arange(0, ROWS)
    k = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    j = k // centers
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    row = i[:, None].to(tl.int64)
    at = tl.load(which + row * which_stride + j[None, :], mask=inside, other=0)
    value = tl.load(gradient + row * gradient_stride + j[None, :], mask=inside, other=0.0)
    own = at.to(tl.int32) == (k - j * centers)[None, :]
    tl.store(out + row * out_stride + k[None, :], tl.where(own, value, 0.0), mask=inside)
