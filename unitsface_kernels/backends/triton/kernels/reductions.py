"""Numbers per row in one launch: means, totals and factors, see ``streaming/reductions.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def mean_kernel(labels, losses, number, out, rows, BLOCK: tl.constexpr):
    """``number`` () = labels (rows,) that are not -1, at least 1, and ``out`` () = the sum of
    ``losses`` (rows,), or 1 if they are None, divided by it. One program.
    """
    counted = tl.zeros((BLOCK,), dtype=tl.int32)
    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < rows
        counted += (tl.load(labels + i, mask=mask, other=-1) != -1).to(tl.int32)
        if losses is not None:
            summed += tl.load(losses + i, mask=mask, other=0.0)
    found = tl.maximum(tl.sum(counted, axis=0), 1).to(tl.float32)
    tl.store(number, found)
    tl.store(out, (tl.sum(summed, axis=0) if losses is not None else 1.0) / found)


@triton.jit
def sum_of(values, size, BLOCK: tl.constexpr):
    """Sum of (size,) float32, in a fixed order."""
    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        summed += tl.load(values + i, mask=i < size, other=0.0)
    return tl.sum(summed, axis=0)


@triton.jit(do_not_specialize=["rows", "slots"])
def finish_totals_kernel(
    losses,
    slopes,
    inverse_norms,
    labels,
    threshold,
    scale,
    loss,
    d_threshold,
    rows,
    slots,
    BLOCK: tl.constexpr,
):
    """``loss`` () and ``d_threshold`` (1,): sums of ``losses`` and ``slopes`` (slots,), or None,
    times ``scale`` (), or None.

    The loss is NaN if an inverse norm (rows,) is, or the threshold (1,), if any, is not finite,
    but for rows whose label is -1. One program.
    """
    total = sum_of(losses, slots, BLOCK)
    doubtful = tl.zeros((BLOCK,), dtype=tl.float32)
    added = tl.load(threshold) if threshold is not None else 0.0
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < rows
        mask &= tl.load(labels + i, mask=mask, other=-1) != -1
        number = (tl.load(inverse_norms + i, mask=mask, other=0.0) + added) * 0.0
        # Selected: 0 times a threshold that is not finite.
        doubtful += tl.where(mask, number, 0.0)
    total += tl.sum(doubtful, axis=0)
    factor = tl.load(scale) if scale is not None else 1.0
    tl.store(loss, total * factor)
    if d_threshold is not None:
        tl.store(d_threshold, sum_of(slopes, slots, BLOCK) * factor)


@triton.jit(do_not_specialize=["rows", "stride"])
def row_factors_kernel(weights, state, labels, out, rows, stride, BLOCK: tl.constexpr):
    """``out`` (3, ``stride``): factors of all negatives, of the target's logit and of its cosine.

    ``state`` (3 or more, rows): of ``finish_rows_kernel``; ``weights`` (rows,): upstream gradients.
    0 where a label is -1.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < rows
    taken = tl.load(labels + i, mask=mask, other=-1) != -1
    weight = tl.load(weights + i, mask=mask, other=0.0)
    probability = tl.load(state + rows + i, mask=mask, other=0.0)
    slope = tl.load(state + 2 * rows + i, mask=mask, other=0.0)
    # Selected: an ignored row may be NaN.
    negative = tl.where(taken, weight * probability, 0.0)
    tl.store(out + i, negative, mask=mask)
    tl.store(out + stride + i, -negative, mask=mask)
    tl.store(out + 2 * stride + i, -negative * slope, mask=mask)
