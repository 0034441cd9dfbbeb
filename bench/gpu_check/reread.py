"""A kernel that loads data of the second-level cache again and again."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reread_kernel(
    source,  # (blocks * BLOCK,) float32
    out,  # (programs,) float32: the sum of all that a program has loaded
    blocks,
    turns,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for turn in range(turns):
        # Programs start at different places, and each comes past all of them.
        block = (program * 7 + turn) % blocks
        # .cg: not from the multiprocessor's own cache.
        sums += tl.load(source + block * BLOCK + lanes, cache_modifier=".cg")
    tl.store(out + program, tl.sum(sums))
