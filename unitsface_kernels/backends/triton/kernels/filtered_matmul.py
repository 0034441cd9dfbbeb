"""GEMMs of a gradient tile over the rows that gradient filtering selected on the device.

Grids are fixed when a kernel is launched; the number of rows is read from device memory, and
programs without work exit at once. So the cost falls with what is left out, and nothing waits for
the host. ``taken``: (n,) int32 whose first ``count`` entries are the selected rows; None: the first
``count`` rows themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import WIDEN, column_subtiles

#: Slices of larger tensors: their alignment must not select another compilation.
_SLICES = ["taken", "count", "total", "out"]


@triton.jit
def _split(count, width, programs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of the result, and parts of the sum over columns that each is split into."""
    blocks = tl.cdiv(count, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    return blocks, tl.maximum(programs // tl.maximum(blocks, 1), 1)


@triton.jit(do_not_specialize=["columns"], do_not_specialize_on_alignment=_SLICES)
def row_products_kernel(
    tile,
    tile_stride,
    b,
    b_stride,
    taken,
    count,
    partial,
    columns,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Parts of ``tile[taken] @ b``, (columns, width) unit columns; one (BLOCK_M, BLOCK_N) each.

    The fewer blocks of rows there are, the more programs share the columns of each.
    """
    program = tl.program_id(0)
    rows = tl.load(count)
    blocks, splits = _split(rows, width, tl.num_programs(0), BLOCK_M, BLOCK_N)
    if program >= blocks * splits:
        return
    block = program % blocks
    width_blocks = tl.cdiv(width, BLOCK_N)
    i = tl.minimum(block // width_blocks * BLOCK_M + tl.arange(0, BLOCK_M), rows - 1)
    if taken is not None:
        i = tl.load(taken + i)
    d = block % width_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = (d < width)[None, :]
    size = tl.cdiv(tl.cdiv(columns, BLOCK_K), splits) * BLOCK_K
    first = program // blocks * size
    last = tl.minimum(first + size, columns)
    whole = tl.maximum(last // BLOCK_K * BLOCK_K, first)
    k = tl.arange(0, BLOCK_K)
    # 32-bit inside a tile.
    left_tile = tile + (i[:, None] * tile_stride + (first + k)[None, :])
    right_tile = b + ((first + k)[:, None] * b_stride + d[None, :])
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _start in range(first, whole, BLOCK_K):
        left = tl.load(left_tile)
        right = tl.load(right_tile, mask=in_width, other=0.0)
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        left_tile += BLOCK_K
        right_tile += BLOCK_K * b_stride
    if whole < last:
        # Apart, as a mask over columns would narrow every load of the tile. What lies behind its
        # columns may be NaN, which a product with zeros would pass on.
        in_columns = whole + k < last
        left = tl.load(left_tile, mask=in_columns[None, :], other=0.0)
        right = tl.load(right_tile, mask=in_columns[:, None] & in_width, other=0.0)
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partial + program.to(tl.int64) * (BLOCK_M * BLOCK_N) + place, total)


@triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=_SLICES)
def add_row_products_kernel(
    partial,
    programs,
    taken,
    count,
    factor,
    total,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the parts of ``row_products_kernel``, in order, to rows ``taken`` of ``total``.

    ``programs``: of that launch. ``factor``: (1,), or None.
    """
    rows = tl.load(count)
    blocks, splits = _split(rows, width, programs, BLOCK_M, BLOCK_N)
    width_blocks = tl.cdiv(width, BLOCK_N)
    first = tl.program_id(0) // width_blocks * ROWS
    if first >= rows:
        return
    width_block = tl.program_id(0) % width_blocks
    i = first + tl.arange(0, ROWS)
    in_rows = i < rows
    block = first // BLOCK_M * width_blocks + width_block
    place = (i % BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    summed = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for split in range(0, splits):
        part = partial + (split * blocks + block).to(tl.int64) * (BLOCK_M * BLOCK_N)
        summed += tl.load(part + place)
    if factor is not None:
        summed *= tl.load(factor)
    if taken is not None:
        i = tl.load(taken + i, mask=in_rows, other=0)
    d = width_block * BLOCK_N + tl.arange(0, BLOCK_N)
    target = total + i[:, None].to(tl.int64) * width + d[None, :]
    mask = in_rows[:, None] & (d < width)[None, :]
    tl.store(target, tl.load(target, mask=mask, other=0.0) + summed, mask=mask)


@triton.jit(do_not_specialize=["columns"], do_not_specialize_on_alignment=_SLICES)
def column_products_kernel(
    tile,
    tile_stride,
    a,
    a_stride,
    taken,
    count,
    factor,
    out,
    columns,
    width,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE_SUBTILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out`` (columns, width), added to or overwritten, = ``tile[taken].T @ a[taken]``."""
    program = tl.program_id(0)
    rows = tl.load(count)
    if ADD and rows == 0:
        return
    width_blocks = tl.cdiv(width, BLOCK_N)
    column = program // width_blocks * BLOCK_M
    width_block = program % width_blocks
    j = column + tl.arange(0, BLOCK_M)
    d = width_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_tile = (j < tile_stride)[:, None]
    in_width = (d < width)[None, :]
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Places are loaded a step ahead: as part of the pipeline they would take half of its depth.
    i = k
    if taken is not None:
        i = tl.load(taken + k, mask=k < rows, other=0)
    for start in range(0, rows, BLOCK_K):
        in_rows = start + k < rows
        left_tile = tile + (i[None, :] * tile_stride + j[:, None])
        right_tile = a + (i[:, None] * a_stride + d[None, :])
        left = tl.load(left_tile, mask=in_rows[None, :] & in_tile, other=0.0)
        right = tl.load(right_tile, mask=in_rows[:, None] & in_width, other=0.0)
        if WIDEN:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        i = start + BLOCK_K + k
        if taken is not None:
            i = tl.load(taken + i, mask=i < rows, other=0)
    if factor is not None:
        total *= tl.load(factor)
    # In subtiles, or the addresses take more registers than there are.
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_SUBTILES
    subtiles = column_subtiles(total, BLOCK_M, BLOCK_N, EPILOGUE_SUBTILES)
    corner = out + column.to(tl.int64) * width
    for subtile in tl.static_range(EPILOGUE_SUBTILES):
        d = width_block * BLOCK_N + subtile * WIDTH + tl.arange(0, WIDTH)
        target = corner + ((j - column)[:, None] * width + d[None, :])
        mask = (j < columns)[:, None] & (d < width)[None, :]
        value = subtiles[subtile]
        if ADD:
            value += tl.load(target, mask=mask, other=0.0)
        tl.store(target, value, mask=mask)


@triton.jit(do_not_specialize=["rows", "start", "columns"])
def add_targets_kernel(
    place,
    order,
    slope,
    a,
    a_stride,
    out,
    factors,
    rows,
    start,
    columns,
    width,
    BLOCK: tl.constexpr,
):
    """Adds ``slope * a`` of the rows whose target is in a tile to its target's place in ``out``.

    ``place``: (rows,) int64 targets in ascending order, those of rows ``order``. A program adds up
    all rows of one target, in their order. ``factors``: (columns,) of ``out``, or None.
    """
    first = tl.program_id(0)
    target = tl.load(place + first)
    before = tl.load(place + tl.maximum(first - 1, 0))
    if (target < start) | (target >= start + columns) | ((first > 0) & (before == target)):
        return
    for column in range(0, width, BLOCK):
        d = column + tl.arange(0, BLOCK)
        in_width = d < width
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        k = first
        same = True
        while same:
            row = tl.load(order + k)
            unit = tl.load(a + row * a_stride + d, mask=in_width, other=0.0).to(tl.float32)
            total += tl.load(slope + row) * unit
            k += 1
            same = tl.load(place + tl.minimum(k, rows - 1)) == target
            same = same & (k < rows)
        if factors is not None:
            total *= tl.load(factors + target - start)
        own = out + (target - start) * width + d
        tl.store(own, tl.load(own, mask=in_width, other=0.0) + total, mask=in_width)
