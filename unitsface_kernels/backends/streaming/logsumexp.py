"""Driver of ``logsumexp`` losses over classes: one positive per row, every other column negative.

Pass 1 streams the columns once and keeps, per row, the negatives' log-sum-exp and the target's
cosine. Pass 2 recomputes each tile's cosines and turns them into both gradients. Two passes of two
products each: as many as accumulating unnormalised row gradients in pass 1 would take, without
having to rescale them, and tiles that contribute nothing can be left out of pass 2 whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...losses import LossSpec
from .call import Call, Gradients, Result, split_weights
from .engine import Engine


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Log-sum-exp of the negatives and target cosine."""
    return 2


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and (2, N) state: log-sum-exp of the negatives and target cosine."""
    log_negatives, target_cosine = _statistics(call, engine)
    per_row, _, _ = _finish_rows(call, engine, log_negatives, target_cosine)
    loss = per_row
    if call.reduction != "none":
        loss = per_row.sum()
        if call.reduction == "mean":
            loss = loss / call.counted()
    return Result(loss, torch.stack([log_negatives, target_cosine]), (None, None, None))


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (N,) upstream gradients of the rows' losses."""
    log_negatives, target_cosine = state.unbind(0)
    weights, scale = split_weights(call, weights)
    _, share, slope = _finish_rows(call, engine, log_negatives, target_cosine)
    negative_weight = torch.where(call.row_labels == -1, 0.0, weights * share)
    # An exact product even where the share underflows: 0 times a finite slope.
    target_gradient = -negative_weight * slope
    return _gradients(call, engine, log_negatives, negative_weight, target_gradient, scale)


def _statistics(call: Call, engine: Engine) -> tuple[Tensor, Tensor]:
    rows = call.rows
    count = rows.shape[0]
    unit, _ = engine.unit_rows(rows, 0, count)
    maximum = rows.new_full((count,), -torch.inf, dtype=torch.float32)
    total = rows.new_zeros(count, dtype=torch.float32)
    target_cosine = rows.new_zeros(count, dtype=torch.float32)
    assert call.columns is not None
    row_block, column_block = engine.class_block
    for start in range(0, call.num_columns, column_block):
        stop = min(start + column_block, call.num_columns)
        columns, _ = engine.unit_rows(call.columns, start, stop, call.column_index, reuse=True)
        for first in range(0, count, row_block):
            block = slice(first, min(first + row_block, count))
            engine.logsumexp_tile(
                unit[block],
                columns,
                call.row_labels[block],
                start,
                maximum[block],
                total[block],
                target_cosine[block],
            )
    return _log_of_sum(maximum, total), target_cosine


def _log_of_sum(maximum: Tensor, total: Tensor) -> Tensor:
    """maximum + log(total), and -inf (not NaN) for a row without negatives."""
    return torch.where(total == 0, -torch.inf, maximum + torch.log(total))


def _finish_rows(
    call: Call, engine: Engine, log_negatives: Tensor, target_cosine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: loss, share q of the negatives in the softmax, and d logit / d cosine.

    With N = log sum of the negatives and z the target's logit, the loss is softplus(N - z) and
    q = sigmoid(N - z). A row whose target is elsewhere has loss N and q = 1.
    """
    logits, slope = engine.positive_rows(target_cosine)
    has_target = call.row_labels >= 0
    gap = log_negatives - logits
    per_row = torch.where(has_target, -F.logsigmoid(-gap), log_negatives)
    share = torch.where(has_target, torch.sigmoid(gap), 1.0)
    per_row = torch.where(call.row_labels == -1, 0.0, per_row)
    return per_row, share, slope


def _gradients(
    call: Call,
    engine: Engine,
    log_negatives: Tensor,
    negative_weight: Tensor,
    target_gradient: Tensor,
    scale: Tensor | None,
) -> Gradients:
    rows, columns = call.rows, call.columns
    assert columns is not None
    count, size = rows.shape
    unit, inverse_norms = engine.unit_rows(rows, 0, count)
    d_rows = rows.new_zeros((count, size), dtype=torch.float32) if call.need_rows else None
    d_columns = None
    if call.need_columns:
        # Every tile writes its columns; without rows there is no tile. Zeroing C x D costs time.
        d_columns = columns.new_empty((call.num_columns, size))
        if count == 0:
            d_columns.zero_()
    row_block, column_block = engine.class_block
    for start in range(0, call.num_columns, column_block):
        stop = min(start + column_block, call.num_columns)
        unit_columns, column_norms = engine.unit_rows(
            columns, start, stop, call.column_index, reuse=True
        )
        d_unit = None
        for first in range(0, count, row_block):
            block = slice(first, min(first + row_block, count))
            tile = engine.logsumexp_gradient_tile(
                unit[block],
                unit_columns,
                call.row_labels[block],
                start,
                log_negatives[block],
                negative_weight[block],
                target_gradient[block],
            )
            if d_rows is not None:
                engine.accumulate(d_rows[block], tile, unit_columns)
            if d_columns is not None:
                if d_unit is None:
                    d_unit = engine.overwrite(tile.T, unit[block])
                else:
                    engine.accumulate(d_unit, tile.T, unit[block])
        if d_columns is not None and d_unit is not None:
            engine.unit_rows_backward(
                d_unit,
                columns,
                start,
                column_norms,
                d_columns[start:stop],
                scale,
                call.column_index,
            )
    if d_rows is not None:
        engine.unit_rows_backward(d_rows, rows, 0, inverse_norms, d_rows, scale)
    return d_rows, d_columns, None
