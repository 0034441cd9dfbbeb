"""Pieces that every tile kernel shares: order of the blocks, the GEMM, and its bounds."""

from __future__ import annotations

import triton
import triton.language as tl

#: The interpreter multiplies bfloat16 as the integers it stores them in.
WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def grouped_block(program, row_blocks, column_blocks, GROUP_M: tl.constexpr):
    """Program number -> (row block, column block), ``GROUP_M`` row blocks at a time.

    Programs that run together then share their operands in L2, whatever the longer side is.
    """
    in_group = GROUP_M * column_blocks
    first = (program // in_group) * GROUP_M
    height = tl.minimum(row_blocks - first, GROUP_M)
    inside = program % in_group
    return first + inside % height, inside // height


@triton.jit
def triangle_block(program, blocks):
    """Program number -> (row block, column block) on or above the diagonal.

    ``blocks * (blocks + 1) / 2`` programs, in integers only. Row r of the triangle has
    ``blocks - r`` blocks, so rows r and ``blocks - 1 - r`` (an odd count: ``blocks - r``, row 0
    alone) fill one row of a rectangle together.
    """
    odd = blocks % 2
    width = blocks + 1 - odd
    upper = program // width
    step = program % width
    in_upper = step < blocks - upper
    row = tl.where(in_upper, upper, blocks - 1 + odd - upper)
    column = tl.where(in_upper, upper + step, step - 1 + odd)
    return row, column


@triton.jit
def pair_block(
    program,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    TRIANGLE: tl.constexpr,
):
    """Program number -> (row block, column block) of the triangle, or of the whole tile."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    if TRIANGLE:
        return triangle_block(program, row_blocks)
    else:
        return grouped_block(program, row_blocks, tl.cdiv(columns, BLOCK_N), GROUP_M)


@triton.jit
def cosine_tile(
    a,
    b,
    a_stride,
    b_stride,
    row,
    column,
    rows,
    columns,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    taken=None,
):
    """(BLOCK_M, BLOCK_N) float32 GEMMs of unit rows ``row:`` with unit columns ``column:``.

    ``DEPTH`` is a multiple of BLOCK_K (unit rows are zero-padded), so the loop has no masks. Rows
    past the end repeat the last one instead of being masked: their cosines are masked later, and
    every load keeps its full vector width. ``taken``: (rows,) places of the rows in ``a``, or None.
    Without a depth ``a`` has the cosines, (rows, a_stride).
    """
    i = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - row)
    j = tl.minimum(tl.arange(0, BLOCK_N), columns - 1 - column)
    if DEPTH == 0:
        corner = a + row.to(tl.int64) * a_stride + column
        total = tl.load(corner + (i[:, None] * a_stride + j[None, :]))
    else:
        k = tl.arange(0, BLOCK_K)
        # 64-bit where the whole matrix counts, 32-bit inside a tile.
        if taken is None:
            a_tile = a + row.to(tl.int64) * a_stride + (i[:, None] * a_stride + k[None, :])
        else:
            a_tile = a + (tl.load(taken + row + i)[:, None] * a_stride + k[None, :])
        b_tile = b + column.to(tl.int64) * b_stride + (j[None, :] * b_stride + k[:, None])
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for _ in range(0, DEPTH, BLOCK_K):
            left = tl.load(a_tile)
            right = tl.load(b_tile)
            if WIDEN:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision=PRECISION)
            a_tile += BLOCK_K
            b_tile += BLOCK_K
    return total


@triton.jit
def column_factors(factors, j):
    """(1, n) factors of the products with the columns ``j`` of a tile: what is missing to cosines.

    ``factors``: the inverse norms of columns that were not brought to unit length; or None, for 1.
    Loads have no mask, so that they are as wide as they can be: of the columns past the end a tile
    has any factors, which memory has to follow for (``Workspace.factors``).
    """
    if factors is None:
        return tl.full((1, 1), 1.0, dtype=tl.float32)
    else:
        return tl.load(factors + j)[None, :]


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x, M: tl.constexpr, N: tl.constexpr):
    left, right = _halves(x, M, N)
    a, b = _halves(left, M, N // 2)
    c, d = _halves(right, M, N // 2)
    return a, b, c, d


@triton.jit
def column_subtiles(x, M: tl.constexpr, N: tl.constexpr, EPILOGUE_SUBTILES: tl.constexpr):
    """(M, N) -> 1, 2, 4 or 8 (EPILOGUE_SUBTILES) tiles of equal width, left to right.

    Threads keep their elements, nothing moves. Working through the subtiles one after the other
    bounds the registers that the intermediate results of a policy take.
    """
    if EPILOGUE_SUBTILES == 1:
        return (x,)
    elif EPILOGUE_SUBTILES == 2:
        return _halves(x, M, N)
    elif EPILOGUE_SUBTILES == 4:
        return _quarters(x, M, N)
    else:
        left, right = _halves(x, M, N)
        a, b, c, d = _quarters(left, M, N // 2)
        e, f, g, h = _quarters(right, M, N // 2)
        return a, b, c, d, e, f, g, h


@triton.jit
def folded(x, COMBINE: tl.constexpr):
    """(M, N) -> (M, 4) by COMBINE of two tiles, N >= 8 a power of two.

    Combines columns that are equal modulo 8, and then neighbors: in a tensor core's result those
    belong to one thread, so that nothing moves.
    """
    M: tl.constexpr = x.shape[0]
    for _ in tl.static_range(6):
        if x.shape[1] > 8:
            left, right = _halves(x, M, x.shape[1])
            x = COMBINE(left, right)
    left, right = tl.split(tl.reshape(x, (M, 4, 2)))
    return COMBINE(left, right)


@triton.jit
def added(a, b):
    return a + b


@triton.jit
def store_gradient(
    gradient, stride, total, row, column, i, j, rows, columns, above, TRIANGLE: tl.constexpr
):
    """A part of a tile's gradient at rows ``i`` and columns ``j`` of the block at ``row`` and
    ``column``; in a TRIANGLE, of a block ``above`` the diagonal, at its mirror image, too.
    """
    total = total.to(gradient.dtype.element_ty)
    # Up to the padded width: full-width stores, and the caller never reads past the end.
    corner = gradient + row.to(tl.int64) * stride + column
    place = (i - row)[:, None] * stride + (j - column)[None, :]
    tl.store(corner + place, total, mask=(i < rows)[:, None] & (j < stride)[None, :])
    # The outer condition is known to the compiler, the inner one is not.
    if TRIANGLE:  # noqa: SIM102
        if above:
            mirror_corner = gradient + column.to(tl.int64) * stride + row
            mirror = (j - column)[:, None] * stride + (i - row)[None, :]
            inside = (j < columns)[:, None] & (i < stride)[None, :]
            tl.store(mirror_corner + mirror, tl.trans(total), mask=inside)
