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
        place: positions among the columns, of which there is at least one; below 0: none.
        slope: 0 takes a pair out, also where its cosine is NaN or its place is none.
        d_rows: (N, D) gradient of the unit rows, or None.
        d_columns: (M or K, D) gradient of the columns themselves, or None.
        scale: () factor of what is added to ``d_columns``.
    """
    assert call.columns is not None
    place = place.clamp(min=0).to(torch.int64)
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
