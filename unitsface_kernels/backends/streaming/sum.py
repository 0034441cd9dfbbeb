"""Driver of ``sum`` losses: loss and gradients from one product per tile.

A pair's gradient needs only that pair, so the tile that yields the loss yields the gradient.
In-batch, cosine (i, j) serves rows i and j: only tiles on and above the diagonal are visited,
1.5 products of N x N x D for loss and gradients instead of 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...losses import LossSpec
from .call import Call, Gradients, Result, clear_ignored, not_finite, split_weights
from .columns import finish_columns
from .engine import Engine, SumTile
from .ranks import Blocks, remote_blocks, remote_tiles
from .scattered import add_pairs
from .skipping import Budget, Positives


@dataclass
class _Totals:
    loss: Tensor  # (N,)
    d_rows: Tensor | None  # (N, D), of the unit rows
    d_threshold: Tensor | None  # (1,), or (M,) per column


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Nothing is kept: a pair's gradient needs only that pair."""
    return 0


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and with ``gradients`` every needed gradient for an upstream gradient of one."""
    scale = 1.0 / call.counted() if call.reduction == "mean" else None
    per_row, found = _stream(call, engine, None, scale, gradients and call.need_any)
    loss = per_row if call.reduction == "none" else per_row.sum()
    if call.shards is not None:
        loss = call.shards.sum(loss)
    if scale is not None:
        loss = loss * scale
    return Result(loss.to(torch.float32), None, found)


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (N,) upstream gradients of the rows' losses, by recomputing the tiles."""
    return _stream(call, engine, *split_weights(call, weights), True)[1]


def _stream(
    call: Call,
    engine: Engine,
    weights: Tensor | None,
    scale: Tensor | None,
    gradients: bool,
) -> tuple[Tensor, Gradients]:
    """(N,) losses and the gradients, weighted per row by ``weights`` and all by ``scale``."""
    rows = call.rows
    unit, inverse_norms = engine.normalize_rows(rows, 0, rows.shape[0])
    clear_ignored(call, unit)
    column_labels = call.column_labels
    if call.columns is None and column_labels is None:
        column_labels = call.row_labels
    a_labels, b_labels = engine.prepare_labels(call.row_labels, column_labels)
    assert call.threshold is not None
    thresholds = call.num_columns if call.spec.threshold == "per_column" else 1
    totals = _Totals(
        loss=not_finite(call, inverse_norms).to(engine.stat_dtype),
        d_rows=(
            rows.new_zeros(rows.shape, dtype=torch.float32)
            if gradients and call.need_rows
            else None
        ),
        d_threshold=(
            rows.new_zeros(thresholds, dtype=engine.stat_dtype)
            if gradients and call.need_threshold
            else None
        ),
    )
    d_columns = None
    budget = Budget(call, engine, weights) if call.filters and len(rows) else None
    if call.columns is None:
        # Their first rows travel while the own block is computed.
        blocks = remote_blocks(call)
        _in_batch(call, engine, unit, a_labels, weights, totals, budget)
        _against_ranks(call, engine, unit, a_labels, b_labels, weights, scale, totals, blocks)
    else:
        d_columns = _against_columns(
            call,
            engine,
            unit,
            a_labels,
            b_labels,
            weights,
            scale,
            totals,
            gradients and call.need_columns,
            budget,
        )
    # With a threshold of NaN, terms of pairs that are left out are NaN as well.
    clear_ignored(call, totals.loss)
    if totals.d_rows is not None:
        engine.normalize_rows_backward(totals.d_rows, rows, 0, inverse_norms, totals.d_rows, scale)
        clear_ignored(call, totals.d_rows)
    d_threshold = totals.d_threshold
    if d_threshold is not None:
        d_threshold = (d_threshold if scale is None else d_threshold * scale).to(torch.float32)
    return totals.loss, (totals.d_rows, d_columns, d_threshold)


def _slice(vector: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if vector is None else vector[start:stop]


def _in_batch(
    call: Call,
    engine: Engine,
    unit: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    totals: _Totals,
    budget: Budget | None,
) -> None:
    assert call.threshold is not None
    count, own = unit.shape[0], call.self_offset or 0
    block = engine.sum_block[0]
    per_column = call.spec.threshold == "per_column"
    threshold = call.threshold[own : own + count] if per_column else call.threshold
    for start in range(0, count, block):
        stop = min(start + block, count)
        for other in range(start, count, block):
            end = min(other + block, count)
            diagonal = other == start
            tile = engine.sum_tile(
                SumTile(
                    a=unit[start:stop],
                    b=unit[other:end],
                    a_labels=labels[start:stop],
                    b_labels=labels[other:end],
                    a_threshold=threshold[start:stop] if per_column else threshold,
                    b_threshold=threshold[other:end] if per_column else threshold,
                    a_weights=_slice(weights, start, stop),
                    b_weights=_slice(weights, other, end),
                    a_loss=totals.loss[start:stop],
                    b_loss=None if diagonal else totals.loss[other:end],
                    d_threshold=totals.d_threshold,
                    a_start=own + start,
                    b_start=own + other,
                    skip=start - other,
                    mirrored=True,
                    gradient=totals.d_rows is not None,
                )
            )
            if tile is None or totals.d_rows is None:
                continue
            if budget is not None and budget.covers(tile, slice(start, stop), slice(other, end)):
                continue
            engine.accumulate(totals.d_rows[start:stop], tile, unit[other:end])
            if not diagonal:
                engine.accumulate(totals.d_rows[other:end], tile.T, unit[start:stop])


def _against_ranks(
    call: Call,
    engine: Engine,
    unit: Tensor,
    a_labels: Tensor,
    b_labels: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
    totals: _Totals,
    blocks: Blocks,
) -> None:
    """Own rows against those of other ranks, which take the same pairs in the other direction.

    A cosine's derivative in both directions needs the remote row's label, threshold and weight
    alone: a tile yields the own rows' whole gradient, and none travels back.
    """
    assert call.threshold is not None
    own = call.self_offset or 0
    per_column = call.spec.threshold == "per_column"
    a_threshold = b_threshold = call.threshold
    if per_column:
        a_threshold = call.threshold[own : own + unit.shape[0]]
    everyone = None
    if weights is not None and call.ranks is not None:
        everyone = call.ranks.weights
        assert everyone is not None
        everyone = everyone if scale is None else everyone / scale
    for rows, columns, unit_columns in remote_tiles(engine, unit, blocks):
        tile = engine.sum_tile(
            SumTile(
                a=unit[rows],
                b=unit_columns,
                a_labels=a_labels[rows],
                b_labels=b_labels[columns],
                a_threshold=a_threshold[rows] if per_column else a_threshold,
                b_threshold=b_threshold[columns] if per_column else b_threshold,
                a_weights=None if weights is None else weights[rows],
                b_weights=None if everyone is None else everyone[columns],
                a_loss=totals.loss[rows],
                b_loss=None,
                d_threshold=totals.d_threshold,
                a_start=own + rows.start,
                b_start=columns.start,
                skip=None,
                mirrored=True,
                gradient=totals.d_rows is not None,
            )
        )
        if tile is not None and totals.d_rows is not None:
            engine.accumulate(totals.d_rows[rows], tile, unit_columns)


def _against_columns(
    call: Call,
    engine: Engine,
    unit: Tensor,
    a_labels: Tensor,
    b_labels: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
    totals: _Totals,
    need_columns: bool,
    budget: Budget | None,
) -> Tensor | None:
    columns, threshold = call.columns, call.threshold
    assert columns is not None
    assert threshold is not None
    row_block, column_block = engine.class_block
    count, size = unit.shape
    per_column = call.spec.threshold == "per_column"
    positives = None if budget is None else Positives(call)
    d_columns = None
    if need_columns and call.sink is None:
        # Every tile writes its columns; zeroing all M x D first costs time.
        d_columns = columns.new_empty((call.num_columns, size), dtype=torch.float32)
    for start in range(0, call.num_columns, column_block):
        stop = min(start + column_block, call.num_columns)
        unit_columns, column_norms = engine.normalize_rows(
            columns, start, stop, call.column_index, reuse=True
        )
        d_unit = None
        for first in range(0, count, row_block):
            last = min(first + row_block, count)
            tile = engine.sum_tile(
                SumTile(
                    a=unit[first:last],
                    b=unit_columns,
                    a_labels=a_labels[first:last],
                    b_labels=b_labels[start:stop],
                    a_threshold=None,
                    b_threshold=threshold[start:stop] if per_column else threshold,
                    a_weights=_slice(weights, first, last),
                    b_weights=None,
                    a_loss=totals.loss[first:last],
                    b_loss=None,
                    d_threshold=totals.d_threshold,
                    a_start=first,
                    b_start=start,
                    skip=None if call.self_offset is None else first + call.self_offset - start,
                    mirrored=False,
                    gradient=need_columns or totals.d_rows is not None,
                )
            )
            if tile is None:
                continue
            rows, wanted = slice(first, last), None
            if budget is not None and positives is not None:
                wanted = positives.unpaid(budget, engine, tile, rows, start)
            row_part = unit[rows]
            if wanted is not None:
                if len(wanted) == 0:
                    continue
                tile, row_part = tile[wanted], row_part[wanted]
            if totals.d_rows is not None:
                if wanted is None:
                    engine.accumulate(totals.d_rows[rows], tile, unit_columns)
                else:
                    part = totals.d_rows[rows][wanted]
                    engine.accumulate(part, tile, unit_columns)
                    totals.d_rows[rows][wanted] = part
            if need_columns:
                if d_unit is None:
                    d_unit = engine.overwrite(tile.T, row_part)
                else:
                    engine.accumulate(d_unit, tile.T, row_part)
        if need_columns:
            finish_columns(call, engine, slice(start, stop), d_unit, column_norms, d_columns, scale)
    if positives is not None:
        for place, slope in zip(positives.places, positives.slopes, strict=True):
            add_pairs(call, engine, unit, place, slope, totals.d_rows, d_columns, scale)
    return d_columns
