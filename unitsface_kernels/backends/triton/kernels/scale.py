"""The factor of a float16 gradient tile, from a bound of what the tile holds."""

from __future__ import annotations

import triton
import triton.language as tl

#: Largest float16 gradient aimed at; a quarter of the format's range is left for rounding up.
FLOAT16_TARGET = tl.constexpr(2.0**14)
#: Bounds computed on the host hold for variables up to this, see ``policy/bounds.py``.
LARGEST_OTHER = tl.constexpr(1e4)
#: Intervals that know nothing are larger, see ``policy/intervals.py``.
LARGEST_BOUND = tl.constexpr(1e29)


@triton.jit
def range_with(low, high, values, size, BLOCK: tl.constexpr):
    """Ranges (BLOCK,) by lane, extended to (size,) values; None: there are no more."""
    if values is None:
        return low, high
    else:
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            value = tl.load(values + i, mask=i < size, other=0.0)
            # What is not a number is compared in vain: its gradients are none either.
            low = tl.where((i < size) & (value < low), value, low)
            high = tl.where((i < size) & (value > high), value, high)
        return low, high


@triton.jit
def ranges(a, b, stride, a_size, b_size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Smallest and largest value of each of COUNT variables, of both sides of a tile."""
    found = ()
    for k in tl.static_range(COUNT):
        low = tl.full((BLOCK,), float("inf"), dtype=tl.float32)
        high = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
        low, high = range_with(low, high, a + k * stride, a_size, BLOCK)
        if b is not None:
            low, high = range_with(low, high, b + k * stride, b_size, BLOCK)
        found += (tl.min(low, axis=0), tl.max(high, axis=0))  # type: ignore[assignment]
    return found


@triton.jit(
    do_not_specialize=[
        *("rows", "a_size", "b_size", "row_stride", "column_stride", "a_thresholds"),
        *("b_thresholds", "directions", "known"),
    ]
)
def scale_kernel(
    out,
    target_gradient,
    rows,
    a_size,
    b_size,
    scalars,
    a_rows,
    b_rows,
    row_stride,
    a_columns,
    b_columns,
    column_stride,
    a_threshold,
    a_thresholds,
    b_threshold,
    b_thresholds,
    directions,
    known,
    parameters,
    BOUND: tl.constexpr,
    SCALARS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A power of two and, four floats behind it, its inverse: what brings gradients of at most a
    bound to the top of the format's range.

    The bound is ``known`` or, if that is less, BOUND of the ranges of a tile's variables (as of
    tile kernels, of ``a_size`` rows and ``b_size`` columns) and thresholds, times ``directions``;
    or the largest of ``target_gradient`` (rows,), if that is more. BOUND None: ``known`` alone.
    """
    limit = known * directions
    if BOUND is not None:
        ends = ()
        for k in tl.static_range(SCALARS):
            value = tl.load(scalars + k)
            ends += (value, value)  # type: ignore[assignment]
        ends += ranges(a_rows, b_rows, row_stride, a_size, b_size, ROWS, BLOCK)
        ends += ranges(b_columns, a_columns, column_stride, b_size, a_size, COLUMNS, BLOCK)
        beyond = known != known
        for k in tl.static_range(2 * (SCALARS + ROWS + COLUMNS)):
            beyond |= tl.abs(ends[k]) > LARGEST_OTHER
        if b_threshold is not None:
            ends += ranges(b_threshold, a_threshold, 0, b_thresholds, a_thresholds, 1, BLOCK)
        # A formula may have the same slope everywhere.
        bound = tl.full((), 0.0, dtype=tl.float32) + BOUND(ends, parameters)
        # All of these are false where it is not a number.
        taken = (bound > 0.0) & (bound < LARGEST_BOUND) & ((bound < known) | beyond)
        limit = tl.where(taken, bound, known) * directions
    if target_gradient is not None:
        low = tl.full((BLOCK,), 0.0, dtype=tl.float32)
        low, high = range_with(low, low, target_gradient, rows, BLOCK)
        limit = tl.maximum(limit, tl.max(tl.maximum(-low, high), axis=0))
    # The exponent of the quotient, 127 more than it is.
    bits = (1.0 / limit * FLOAT16_TARGET).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits >> 23) & 255, 27), 227)
    tl.store(out, (exponent << 23).to(tl.float32, bitcast=True))
    tl.store(out + 4, ((254 - exponent) << 23).to(tl.float32, bitcast=True))
