"""Gradients of single pairs: one column per row, wherever it lies."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .engine import Engine


def add_pairs(
    call: Call,
    engine: Engine,
    unit: Tensor,
    place: Tensor,
    slope: Tensor,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
    scale: Tensor | None = None,
) -> None:
    """Adds d loss / d cosine ``slope`` (N,) of every row with the column at ``place`` (N,).

    Args:
        unit: (N, D) unit rows.
        place: positions among the columns; below 0: none.
        slope: 0 takes a pair out, also where its cosine is NaN or its place is none.
        d_rows: (N, D) gradient of the unit rows, or None.
        d_columns: (M or K, D) gradient of the columns themselves, or None.
        scale: () factor of what is added to ``d_columns``.
    """
    assert call.columns is not None
    if call.num_columns == 0:
        # There is no column that could stand in for a place that is none.
        return
    place = place.to(torch.int64).clamp(0, call.num_columns - 1)
    index = place if call.column_index is None else call.column_index[place]
    unit_columns, norms = engine.unit_rows(call.columns, 0, unit.shape[0], index, reuse=True)
    slope, taken = slope[:, None], (slope != 0.0)[:, None]
    if d_rows is not None:
        d_rows += torch.where(taken, slope * unit_columns, 0.0)
    if d_columns is not None:
        d_unit = torch.where(taken, slope * unit, 0.0)
        # The Jacobian is linear: applied to each pair's share, it is applied to their sum.
        engine.unit_rows_backward(d_unit, call.columns, 0, norms, d_unit, scale, index)
        _add_rows(d_columns, place, d_unit)


def stream_pairs(call: Call, engine: Engine, unit: Tensor, places: Tensor, slopes: Tensor) -> None:
    """The columns' side of :func:`add_pairs` for a call with a sink, tile by tile.

    A tile without pairs has a gradient of zero. Waits for the device.

    Args:
        places, slopes: (k, N) as of :func:`add_pairs`.
    """
    assert call.columns is not None
    assert call.sink is not None
    count, size = unit.shape
    block = engine.class_block[1]
    ordered, order = places.to(torch.int64).flatten().sort(stable=True)
    slopes = slopes.flatten()[order]
    starts = torch.arange(0, call.num_columns + block, block, device=unit.device)
    bounds = torch.searchsorted(ordered, starts).tolist()
    gradient = unit.new_empty((block, size), dtype=torch.float32)
    for number, start in enumerate(range(0, call.num_columns, block)):
        tile = slice(start, min(start + block, call.num_columns))
        out = gradient[: tile.stop - start].zero_()
        pairs = slice(bounds[number], bounds[number + 1])
        if pairs.start < pairs.stop:
            place, row = ordered[pairs], order[pairs] % count
            index = place if call.column_index is None else call.column_index[place]
            _, norms = engine.unit_rows(call.columns, 0, len(place), index, reuse=True)
            slope = slopes[pairs, None]
            d_unit = torch.where(slope != 0.0, slope * unit[row], 0.0)
            engine.unit_rows_backward(d_unit, call.columns, 0, norms, d_unit, None, index)
            _add_rows(out, place - start, d_unit)
        call.sink(tile, out)


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """``total[index] += rows`` in a fixed order: each of the two is deterministic on its device.

    On CUDA ``index_add_`` has float atomics, and ``index_put_`` sorts; on the CPU it is the
    latter that adds in parallel.
    """
    rows = rows.to(total.dtype)
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)
