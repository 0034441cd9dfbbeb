"""Variables of a formula in the kernels of tiles.

A policy's function reads them as a tuple: scalars, then those of rows, then those of columns, which
broadcast over the pairs of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import added, folded


@triton.jit
def scalar_values(scalars, COUNT: tl.constexpr):
    """The numbers of (COUNT,)."""
    found = ()
    for k in tl.static_range(COUNT):
        found += (tl.load(scalars + k),)  # type: ignore[assignment]
    return found


@triton.jit
def values_at(values, stride, place, inside, AXIS: tl.constexpr, COUNT: tl.constexpr):
    """The numbers at ``place`` of each row of a matrix (COUNT, n), with a new axis ``AXIS``."""
    found = ()
    for k in tl.static_range(COUNT):
        # 1 is what ignored rows and columns have.
        value = tl.load(values + k * stride + place, mask=inside, other=1.0)
        found += (tl.expand_dims(value, AXIS),)  # type: ignore[assignment]
    return found


@triton.jit
def zero_tiles(HEIGHT: tl.constexpr, COUNT: tl.constexpr):
    """COUNT totals for ``plus_slopes``."""
    found = ()
    for _ in tl.static_range(COUNT):
        found += (tl.zeros((HEIGHT, 4), dtype=tl.float32),)  # type: ignore[assignment]
    return found


@triton.jit
def plus_slopes(totals, terms, valid, weight, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """``totals`` and the weighted derivatives of all pairs; nothing leaves its thread."""
    found = ()
    for k in tl.static_range(COUNT):
        slope = tl.where(valid, terms[FIRST + k] * weight, 0.0)
        found += (totals[k] + folded(slope, added),)  # type: ignore[assignment]
    return found


@triton.jit
def store_row_sums(
    out, terms, valid, weight, plane, mask, FIRST: tl.constexpr, COUNT: tl.constexpr
):
    """Sums over columns of COUNT weighted values of pairs, ``plane`` apart from one another."""
    for k in tl.static_range(COUNT):
        value = tl.where(valid, terms[FIRST + k] * weight, 0.0)
        tl.store(out + k * plane, tl.sum(value, axis=1), mask=mask)


@triton.jit
def store_column_sums(
    out, terms, valid, weight, plane, mask, FIRST: tl.constexpr, COUNT: tl.constexpr
):
    """Sums over stretches of rows, as many as ``out`` (stretches, columns) has."""
    STRETCHES: tl.constexpr = out.shape[0]
    HEIGHT: tl.constexpr = valid.shape[0] // STRETCHES
    for k in tl.static_range(COUNT):
        value = tl.where(valid, terms[FIRST + k] * weight, 0.0)
        stacked = tl.reshape(value, (STRETCHES, HEIGHT, valid.shape[1]))
        tl.store(out + k * plane, tl.sum(stacked, axis=1), mask=mask)


@triton.jit
def logits_of(FUNCTION: tl.constexpr, cosine, parameters, variables, COUNT: tl.constexpr):
    """What a policy's function of logits returns; with COUNT variables it reads them."""
    if COUNT == 0:
        return FUNCTION(cosine, parameters)
    else:
        return FUNCTION(cosine, parameters, variables)


@triton.jit
def keeps_apart(rows, subtile, EPILOGUE_SUBTILES: tl.constexpr):
    """True, which the compiler does not know: branches keep it from working on all subtiles at a
    time, which would take more registers than there are."""
    return rows > subtile - EPILOGUE_SUBTILES
