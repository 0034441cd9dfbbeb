"""Kernels over rows: unit length and its Jacobian, and identities narrowed to 32 bits."""

from __future__ import annotations

import triton
import triton.language as tl

#: Makes the squares of every row's elements finite: 2^-70.
SHRINK = tl.constexpr(2.0**-70)


@triton.jit(do_not_specialize=["start", "count"])
def normalize_rows_kernel(
    source,
    index,
    start,
    out,
    out_stride,
    inverse_norms,
    count,
    width,
    labels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows ``start:start + count`` of ``source`` (of ``source[index]``) at unit length.

    Rows of ``out`` are zero from ``width`` to ``out_stride``, so that GEMMs need no masks, and
    where ``labels`` (count,), if not None, are -1. The inverse norm of a row with an element that
    is not finite is NaN. ``out`` None: norms alone.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = i < count
    place = i.to(tl.int64) + start
    if index is not None:
        place = tl.load(index + place, mask=in_rows, other=0)
    lanes = tl.arange(0, BLOCK)
    first = place[:, None] * width
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for k in range(0, width, BLOCK):
        mask = in_rows[:, None] & (k + lanes < width)[None, :]
        x = tl.load(source + first + (k + lanes)[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += x * x
    total = tl.sum(squares, axis=1)
    norm = tl.sqrt(total)
    # The comparison is false for NaN, which has to survive.
    clamped = norm < 1e-5
    inverse = tl.where(clamped, 1e5, 1.0 / tl.where(clamped, 1.0, norm))
    extreme = (total <= 3.4028234663852886e38) == 0
    if tl.max(extreme.to(tl.int32), axis=0) > 0:
        # Squares overflow, or there is a NaN: again, of elements times 2^-70.
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for k in range(0, width, BLOCK):
            mask = in_rows[:, None] & (k + lanes < width)[None, :]
            x = tl.load(source + first + (k + lanes)[None, :], mask=mask, other=0.0).to(tl.float32)
            x *= SHRINK
            squares += x * x
        total = tl.sum(squares, axis=1)
        # A difference of infinities or NaN is NaN. Above the denormals.
        again = tl.where(extreme, SHRINK / tl.sqrt(tl.where(extreme, total, 1.0)), 1.0)
        again = tl.where(again < 1.1754943508222875e-38, 1.1754943508222875e-38, again)
        inverse = tl.where(extreme, again + (total - total), inverse)
    tl.store(inverse_norms + i, inverse, mask=in_rows)
    if out is not None:
        target = i[:, None].to(tl.int64) * out_stride
        taken = in_rows
        if labels is not None:
            taken &= tl.load(labels + i, mask=in_rows, other=-1) != -1
        for k in range(0, out_stride, BLOCK):
            mask = taken[:, None] & (k + lanes < width)[None, :]
            x = tl.load(source + first + (k + lanes)[None, :], mask=mask, other=0.0).to(tl.float32)
            # Selected: 0 times NaN is not the 0 of the padding.
            unit = tl.where(mask, x * inverse[:, None], 0.0).to(out.dtype.element_ty)
            inside = in_rows[:, None] & (k + lanes < out_stride)[None, :]
            tl.store(out + target + (k + lanes)[None, :], unit, mask=inside)


@triton.jit
def products_along(
    d_unit, source, inverse, in_rows, width, lanes, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """<g, u> (ROWS,) of rows at pointers (ROWS, 1), u = ``inverse`` x.

    0 where the norm is clamped: it is a constant.
    """
    products = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for k in range(0, width, BLOCK):
        mask = in_rows[:, None] & (k + lanes < width)[None, :]
        x = tl.load(source + (k + lanes)[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(d_unit + (k + lanes)[None, :], mask=mask, other=0.0)
        products += g * (x * inverse[:, None])
    return tl.where(inverse >= 1e5, 0.0, tl.sum(products, axis=1))


@triton.jit(do_not_specialize=["start", "count"])
def normalize_rows_backward_kernel(
    d_unit,
    source,
    index,
    start,
    inverse_norms,
    scale,
    out,
    count,
    width,
    labels,
    RAW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out`` = r (g - <g, u> u) times ``scale``; ``out`` may be ``d_unit``: each row is read
    whole before it is written. 0 where ``labels`` (count,), if not None, are -1. ``d_unit`` is g,
    or with ``RAW`` r g.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = i < count
    place = i.to(tl.int64) + start
    if index is not None:
        place = tl.load(index + place, mask=in_rows, other=0)
    lanes = tl.arange(0, BLOCK)
    first = place[:, None] * width
    target = i[:, None].to(tl.int64) * width
    inverse = tl.load(inverse_norms + i, mask=in_rows, other=0.0)
    along = products_along(
        d_unit + target, source + first, inverse, in_rows, width, lanes, ROWS, BLOCK
    )
    factor = tl.full((ROWS,), 1.0, dtype=tl.float32) if RAW else inverse
    if scale is not None:
        factor *= tl.load(scale)
    taken = in_rows
    if labels is not None:
        taken &= tl.load(labels + i, mask=in_rows, other=-1) != -1
    for k in range(0, width, BLOCK):
        mask = in_rows[:, None] & (k + lanes < width)[None, :]
        x = tl.load(source + first + (k + lanes)[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(d_unit + target + (k + lanes)[None, :], mask=mask, other=0.0)
        d = factor[:, None] * (g - along[:, None] * (x * inverse[:, None]))
        # Selected: an ignored row may be NaN.
        d = tl.where(taken[:, None], d, 0.0)
        tl.store(out + target + (k + lanes)[None, :], d.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "slots"])
def narrow_labels_kernel(labels, count, table, slots, out, BLOCK: tl.constexpr):
    """int64 identities -> int32 identities, equal where and only where the originals are.

    Below 2^30 they stay as they are. Any others become 2^30 + their slot in ``table``, a hash table
    with linear probing that all labels of a call share: ``slots`` (a power of two, at most half of
    which will be taken) int64 of -1, and one more. Exact for every label, and free where there is
    none. Negative ones become -1.
    """
    limit: tl.constexpr = 1073741824
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    label = tl.load(labels + i, mask=mask, other=-1)
    large = label >= limit
    narrow = tl.where(large | (label < 0), -1, label).to(tl.int32)
    if tl.max(large.to(tl.int32), axis=0) > 0:
        # The upper bits of a product depend on all bits of the label.
        mixed = (label ^ (label >> 32)) * 0x9E3779B97F4A7C1
        slot = ((mixed >> 24) & (slots - 1)).to(tl.int32)
        searching = large
        empty = tl.full((BLOCK,), -1, dtype=tl.int64)
        while tl.max(searching.to(tl.int32), axis=0) > 0:
            # There is no mask: the others exchange -1 for -1 in the slot that is never taken.
            found = tl.atomic_cas(
                table + tl.where(searching, slot, slots),
                empty,
                tl.where(searching, label, empty),
            )
            hit = (found == empty) | (found == label)
            narrow = tl.where(searching & hit, limit + slot, narrow)
            searching = searching & (hit == 0)
            slot = tl.where(searching, (slot + 1) & (slots - 1), slot)
    tl.store(out + i, narrow, mask=mask)
