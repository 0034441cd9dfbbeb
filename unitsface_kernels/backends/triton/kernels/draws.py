"""Random numbers by key and place, see ``draws.py`` of the package."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mixed(x):
    """``draws.mix_32`` of uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["seed", "first", "count"])
def centered_kernel(draw, seed, first, out, count, BLOCK: tl.constexpr):
    """``draws.centered``, with the mixed ``seed``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = (i.to(tl.int64) + first).to(tl.uint32)
    # Not of a single number: the interpreter would warn that its product wraps around.
    key = tl.zeros((BLOCK,), dtype=tl.uint32) + tl.load(draw).to(tl.uint32)
    key = mixed(key ^ seed.to(tl.uint32))
    bits = mixed(mixed(place ^ key) ^ mixed(key + 1))
    # Every step is exact.
    uniform = (bits.to(tl.float64) + 0.5) / 4294967296.0
    tl.store(out + i, 2.0 * uniform - 1.0, mask=i < count)


@triton.jit(do_not_specialize=["count", "size"])
def distinct_kernel(places, out, count, size, BLOCK: tl.constexpr):
    """``places`` (count,) int64, ascending, each once and only those below ``size``; behind them
    ``out`` is ``size``. One program.
    """
    found = tl.zeros((), dtype=tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < count
        place = tl.load(places + i, mask=mask, other=0)
        before = tl.load(places + i - 1, mask=mask & (i > 0), other=-1)
        taken = (mask & (place < size) & (place != before)).to(tl.int32)
        target = found + tl.cumsum(taken, axis=0) - 1
        tl.store(out + target, place, mask=taken == 1)
        found += tl.sum(taken, axis=0)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        rest = tl.zeros((BLOCK,), dtype=tl.int64) + size
        tl.store(out + i, rest, mask=(i >= found) & (i < count))


@triton.jit(do_not_specialize=["labels_count", "index_count", "rounds"])
def positions_kernel(labels, index, out, labels_count, index_count, rounds, BLOCK: tl.constexpr):
    """First places in ``index`` (index_count,) int64, ascending, that are not below ``labels``
    (labels_count,) int64; negative labels as they are. ``rounds``: bits of ``index_count``.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < labels_count
    label = tl.load(labels + i, mask=mask, other=-1)
    low = tl.zeros((BLOCK,), dtype=tl.int64)
    high = low + index_count
    for _ in range(0, rounds):
        middle = (low + high) // 2
        open_ = (label >= 0) & (low < high)
        below = tl.load(index + middle, mask=mask & open_, other=0) < label
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    tl.store(out + i, tl.where(label < 0, label, low), mask=mask)
