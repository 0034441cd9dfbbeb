"""A step of an optimizer on rows, from the gradient of these at unit length."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import products_along

#: RowRule of ``row_update.h``.
SGD, ADAMW = tl.constexpr(0), tl.constexpr(1)


@triton.jit(do_not_specialize=["start", "count"])
def update_rows_kernel(
    d_unit,
    source,
    index,
    start,
    inverse_norms,
    scale,
    factor,
    first,
    second,
    count,
    width,
    numbers,
    RAW: tl.constexpr,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A step on rows ``start:start + count`` of ``source`` (of ``source[index]``), in place.

    Their gradient is that of ``normalize_rows_backward_kernel``, times ``factor`` (), if not None.
    ``first`` and ``second``: states of the rule, like ``source``, or None; ``numbers``: of
    ``NUMBERS``.
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = i < count
    place = i.to(tl.int64) + start
    if index is not None:
        place = tl.load(index + place, mask=in_rows, other=0)
    lanes = tl.arange(0, BLOCK)
    from_row = place[:, None] * width
    target = i[:, None].to(tl.int64) * width
    inverse = tl.load(inverse_norms + i, mask=in_rows, other=0.0)
    along = products_along(
        d_unit + target, source + from_row, inverse, in_rows, width, lanes, ROWS, BLOCK
    )
    whole = tl.full((ROWS,), 1.0, dtype=tl.float32) if RAW else inverse
    if scale is not None:
        whole *= tl.load(scale)
    if factor is not None:
        whole *= tl.load(factor)
    for k in range(0, width, BLOCK):
        mask = in_rows[:, None] & (k + lanes < width)[None, :]
        at = from_row + (k + lanes)[None, :]
        w = tl.load(source + at, mask=mask, other=0.0)
        g = tl.load(d_unit + target + (k + lanes)[None, :], mask=mask, other=0.0)
        g = whole[:, None] * (g - along[:, None] * (w * inverse[:, None]))
        if RULE == ADAMW:
            mean = tl.load(first + at, mask=mask, other=0.0)
            square = tl.load(second + at, mask=mask, other=0.0)
            mean += numbers[2] * (g - mean)
            square = numbers[3] * square + numbers[4] * (g * g)
            root = tl.sqrt(square) / numbers[5] + numbers[6]
            w = w * numbers[1] - numbers[0] * (mean / root)
            tl.store(first + at, mean, mask=mask)
            tl.store(second + at, square, mask=mask)
        else:
            g += numbers[1] * w
            if first is not None:
                buffer = numbers[2] * tl.load(first + at, mask=mask, other=0.0) + g
                tl.store(first + at, buffer, mask=mask)
                g = g + numbers[2] * buffer if NESTEROV else buffer
            w -= numbers[0] * g
        tl.store(source + at, w, mask=mask)


#: Hyper-parameters by rule, in the order of the kernel's.
NUMBERS = (
    ("step_size", "weight_decay", "momentum"),
    (
        *("step_size", "kept", "one_minus_beta1", "beta2"),
        *("one_minus_beta2", "second_correction", "eps"),
    ),
)
