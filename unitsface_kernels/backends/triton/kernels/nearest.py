"""Kernels that search for each row's nearest wrong columns, independent of the loss.

A found column is one int64: the key of its cosine above, its position below, so that one maximum
decides both in the order of the search: NaN before every number, of equal cosines the smaller
position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import column_factors, cosine_tile, grouped_block

#: Below the key of every cosine: a column that takes no part.
NO_KEY = tl.constexpr(-(2**31))
#: Key of -inf, which no cosine has: a place that is not filled.
EMPTY_KEY = tl.constexpr(-2139095041)
EMPTY = tl.constexpr(-2139095041 * 2**32)
LARGEST = tl.constexpr(2**31 - 1)
#: Before and behind every found column.
FIRST = tl.constexpr(2**63 - 1)
LAST = tl.constexpr(-(2**63))


@triton.jit
def ordered_key(cosine):
    """int32 in the order of the search: the largest for NaN, the same for -0 and 0."""
    bits = (cosine + 0.0).to(tl.int32, bitcast=True)
    return tl.where(cosine != cosine, LARGEST, bits ^ ((bits >> 31) & LARGEST))


@triton.jit
def cosine_of(key):
    return (key ^ ((key >> 31) & LARGEST)).to(tl.float32, bitcast=True)


@triton.jit
def pack(key, position):
    # The smaller the position, the larger its complement.
    return (key.to(tl.int64) << 32) | (position ^ LARGEST).to(tl.int64)


@triton.jit
def _any(flags, ROWS: tl.constexpr):
    """Whether one of (ROWS,) is true, as an integer.

    Of two columns: Triton 3.6 fails on Blackwell at a reduction over the only dimension of what
    comes from an accumulator.
    """
    left, right = tl.split(tl.max(tl.reshape(flags.to(tl.int32), (ROWS // 2, 2)), axis=0))
    return tl.maximum(left, right)


@triton.jit(do_not_specialize=["rows", "columns", "start", "count"])
def nearest_kernel(
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
    best,
    count,
    candidates,
    found,
    target_cosine,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The at most ``count`` columns of each block that beat the last one found so far.

    ``candidates``: (column blocks * count, rows) int64, less than 2^31 of them, of which the first
    ``found`` (column blocks, rows) of each block are written. After a few tiles hardly any column
    beats the last one. ``b_factors`` (columns,): see ``column_factors``.
    """
    row_blocks = tl.cdiv(rows, BLOCK_M)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    row_block, column_block = grouped_block(tl.program_id(0), row_blocks, column_blocks, GROUP_M)
    row = row_block * BLOCK_M
    column = column_block * BLOCK_N
    cosine = cosine_tile(
        a, b, a_stride, b_stride, row, column, rows, columns, DEPTH,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    i = row + tl.arange(0, BLOCK_M)
    j = column + tl.arange(0, BLOCK_N)
    if b_factors is not None:
        cosine *= column_factors(b_factors, j)
    in_rows = i < rows
    target = tl.load(targets + i, mask=in_rows, other=-1)
    target = tl.where(target < 0, -1, target - start).to(tl.int32)
    is_target = target[:, None] == j[None, :]
    has_target = (target >= column) & (target < tl.minimum(column + BLOCK_N, columns))
    if tl.max(has_target.to(tl.int32), axis=0) > 0:
        own = tl.sum(tl.where(is_target, cosine, 0.0), axis=1)
        tl.store(target_cosine + i, own, mask=has_target)
    keys = tl.where(is_target | (j >= columns)[None, :], NO_KEY, ordered_key(cosine))
    last = tl.load(best + i.to(tl.int64) * count + (count - 1), mask=in_rows, other=float("nan"))
    last = ordered_key(last)
    top = tl.max(keys, axis=1)
    number = tl.zeros((BLOCK_M,), dtype=tl.int32)
    rank = 0
    going = _any(top > last, BLOCK_M)
    while going > 0:
        place = tl.min(tl.where(keys == top[:, None], j[None, :], LARGEST), axis=1)
        # The maxima of a row fall: those that beat the last come first.
        better = top > last
        out = (column_block * count + rank) * rows + i
        tl.store(candidates + out, pack(top, start + place), mask=better)
        number += better.to(tl.int32)
        keys = tl.where(j[None, :] == place[:, None], NO_KEY, keys)
        top = tl.max(keys, axis=1)
        rank += 1
        going = tl.where(rank < count, _any(top > last, BLOCK_M), 0)
    tl.store(found + column_block * rows + i, number, mask=in_rows)


@triton.jit(do_not_specialize=["blocks", "rows", "count"])
def merge_nearest_kernel(
    candidates,
    found,
    best,
    position,
    blocks,
    rows,
    count,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Folds the blocks' candidates into the running (rows, count) ones, ``SLOTS`` at least 2."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = i < rows
    slot = tl.arange(0, SLOTS)
    used = slot < count
    inside = in_rows[:, None] & used[None, :]
    place = i[:, None].to(tl.int64) * count + slot[None, :]
    key = ordered_key(tl.load(best + place, mask=inside, other=0.0))
    at = tl.load(position + place, mask=inside, other=0)
    # Places that are not filled differ, so that a candidate fills one of them.
    running = tl.where(at < 0, slot[None, :].to(tl.int64) + EMPTY, pack(key, at))
    running = tl.where(used[None, :], running, FIRST)
    for first in range(0, blocks, BLOCK):
        k = first + tl.arange(0, BLOCK)
        mask = (k < blocks)[:, None] & in_rows[None, :]
        numbers = tl.load(found + k[:, None] * rows + i[None, :], mask=mask, other=0)
        if tl.max(tl.max(numbers, axis=1), axis=0) > 0:
            for block in range(first, tl.minimum(first + BLOCK, blocks)):
                number = tl.load(found + block * rows + i, mask=in_rows, other=0)
                for rank in range(0, tl.max(number, axis=0)):
                    source = (block * count + rank) * rows + i
                    new = tl.load(candidates + source, mask=rank < number, other=LAST)
                    smallest = tl.min(running, axis=1)
                    taken = (running == smallest[:, None]) & (new > smallest)[:, None]
                    running = tl.where(taken, new[:, None], running)
    running = tl.sort(running, dim=1, descending=True)
    key = (running >> 32).to(tl.int32)
    at = (running & LARGEST).to(tl.int32) ^ LARGEST
    # The unused slots have moved to the front.
    slot -= SLOTS - count
    place = i[:, None].to(tl.int64) * count + slot[None, :]
    inside = in_rows[:, None] & (slot >= 0)[None, :]
    tl.store(best + place, cosine_of(key), mask=inside)
    tl.store(position + place, tl.where(key == EMPTY_KEY, -1, at), mask=inside)
