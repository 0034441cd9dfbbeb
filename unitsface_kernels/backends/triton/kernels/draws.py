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
