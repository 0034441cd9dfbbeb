"""Kernels of the moving statistics of norms, see ``backends/norms.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def norm_sums_kernel(
    source,
    labels,
    out,
    count,
    width,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Numbers of each ROWS rows of ``source``, as a row of ``out`` (programs, 3)."""
    program = tl.program_id(0)
    i = program * ROWS + tl.arange(0, ROWS)
    taken = i < count
    # Widened: unsigned labels cannot be compared with -1.
    taken &= tl.load(labels + i, mask=taken, other=0).to(tl.int64) != -1
    lanes = tl.arange(0, BLOCK)
    first = i[:, None].to(tl.int64) * width
    # Squares of float32 that overflow or vanish do not in float64.
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float64)
    for k in range(0, width, BLOCK):
        mask = taken[:, None] & (k + lanes < width)[None, :]
        x = tl.load(source + first + (k + lanes)[None, :], mask=mask, other=0.0).to(tl.float64)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, axis=1))
    # Comparisons, which keep a NaN; 0 times infinity is one.
    clipped = tl.where(norm < LOW, LOW, tl.where(norm > HIGH, HIGH, norm)) + norm * 0.0
    clipped = tl.where(taken, clipped, 0.0)
    tl.store(out + 3 * program, tl.sum(taken.to(tl.float64), axis=0))
    tl.store(out + 3 * program + 1, tl.sum(clipped, axis=0))
    tl.store(out + 3 * program + 2, tl.sum(clipped * clipped, axis=0))


@triton.jit
def moved(kept, found, SHARE: tl.constexpr):
    """A number moved towards one of float64, unless that is none."""
    wide = kept.to(tl.float64)
    # As torch.lerp: exact at either end.
    if SHARE < 0.5:  # noqa: SIM108
        new = wide + SHARE * (found - wide)
    else:
        new = found - (found - wide) * (1.0 - SHARE)
    return tl.where(new == new, new.to(kept.dtype), kept)


@triton.jit(do_not_specialize=["parts"])
def moved_statistics_kernel(sums, mean, std, out, parts, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` (2,) from ``sums`` (parts, 3)."""
    counts = tl.zeros((BLOCK,), dtype=tl.float64)
    totals = tl.zeros((BLOCK,), dtype=tl.float64)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, parts, BLOCK):
        k = start + tl.arange(0, BLOCK)
        counts += tl.load(sums + 3 * k, mask=k < parts, other=0.0)
        totals += tl.load(sums + 3 * k + 1, mask=k < parts, other=0.0)
        squares += tl.load(sums + 3 * k + 2, mask=k < parts, other=0.0)
    count = tl.sum(counts, axis=0)
    total = tl.sum(totals, axis=0)
    average = total / count
    variance = tl.sum(squares, axis=0) - total * average
    variance = tl.where(variance < 0.0, 0.0, variance) / (count - 1.0)
    deviation = tl.where(count > 1.0, tl.sqrt(variance), float("nan"))
    tl.store(out, moved(tl.load(mean), average, SHARE))
    tl.store(out + 1, moved(tl.load(std), deviation, SHARE))
