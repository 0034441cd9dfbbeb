"""Driver of ``logsumexp`` losses over samples: any number of positives per row, also none.

With z the logits and N_i the log-sum-exp of row i's negatives, a row's loss is the mean over its
positives p of softplus(N_i - z_ip), or N_i itself if positives take no part in the loss. Every pass
streams all tiles: negatives for N, positives for the loss and for Q_i = mean_p sigmoid(N_i - z_ip),
and the gradient. In-batch each tile on or above the diagonal serves both directions of its pairs:
0.5 GEMMs of N x N x D for each pass and 1 for what consumes the gradient. Where reading a label
does not stall a device, the positives' pass visits only pairs that may be positive. Against the
batches of other ranks a tile serves its rows, which get the gradient of both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...losses import LossSpec
from .call import Call, Gradients, Result, not_finite, split_weights
from .columns import norms_of_losses
from .engine import Engine, NegativeSums, PairWeights, PositiveSums, part
from .pair_tiles import (
    Operands,
    Prepared,
    gradients_of_pairs,
    log_of_sums,
    operands_of,
    other_side,
    others_of,
    remote_tiles,
    result_of,
    tiles,
)


def state_rows(spec: LossSpec, params: tuple[float, ...]) -> int:
    """Log-sum-exp of the negatives, and their mean probability Q."""
    return 2


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and (2, num_losses) state: log-sum-exp N of the negatives and probability Q."""
    prepared = operands_of(call, engine)
    _, inverse_norms, values = prepared
    log_negatives = _log_negatives(call, engine, prepared)
    if call.spec.positive is None:
        per_row, negative_prob = log_negatives, torch.ones_like(log_negatives)
    else:
        per_row, negative_prob = _positives(call, engine, prepared, log_negatives)
    doubtful = not_finite(call, norms_of_losses(call, engine, inverse_norms))
    per_row = torch.where(call.valid_rows, per_row, doubtful)
    return result_of(call, engine, per_row, torch.stack([log_negatives, negative_prob]), values)


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (num_losses,) upstream gradients."""
    log_negatives, negative_prob = state.unbind(0)
    weights, scale = split_weights(call, weights)
    # A row without negatives has a constant loss: 0, or -inf.
    live = call.valid_rows & (log_negatives != -torch.inf)
    factors = PairWeights(
        log_negatives=torch.where(live, log_negatives, torch.inf),
        negative=torch.where(live, weights * negative_prob, 0.0),
        positive=torch.where(live, weights / call.pair_counts[0].clamp(min=1), 0.0),
    )
    return gradients_of_pairs(call, engine, operands_of(call, engine), factors, scale)


# --- statistics -----------------------------------------------------------------------------------


def _log_negatives(call: Call, engine: Engine, prepared: Prepared) -> Tensor:
    count = call.num_losses
    sums = NegativeSums(
        maximum=call.rows.new_full((count,), -torch.inf, dtype=torch.float32),
        total=call.rows.new_zeros(count, dtype=torch.float32),
    )
    others = others_of(call, engine, prepared)
    for tile, rows, columns in tiles(call, engine, prepared.operands):
        engine.pair_negatives_tile(tile, part(sums, rows), other_side(call, tile, sums, columns))
    for side in others:
        for tile, rows, _ in remote_tiles(call, engine, side):
            engine.pair_negatives_tile(tile, part(sums, rows), None)
    return log_of_sums(sums.maximum, sums.total)


def _positives(
    call: Call, engine: Engine, prepared: Prepared, log_negatives: Tensor
) -> tuple[Tensor, Tensor]:
    """(num_losses,) means over the positives of softplus(N - z) and of sigmoid(N - z)."""
    others = others_of(call, engine, prepared)
    operands = prepared.operands
    own, chosen = operands, None
    if not call.rows.is_cuda:
        own, chosen = _possible_positives(call, engine, operands)
    some = log_negatives if chosen is None else log_negatives[chosen]
    sums = PositiveSums(some, torch.zeros_like(some), torch.zeros_like(some))
    for tile, rows, columns in tiles(call, engine, own):
        engine.pair_positives_tile(tile, part(sums, rows), other_side(call, tile, sums, columns))
    if chosen is not None:
        totals = (torch.zeros_like(log_negatives).index_copy_(0, chosen, t) for t in sums[1:])
        sums = PositiveSums(log_negatives, *totals)
    possible = None
    if call.ranks is not None and call.columns is None and not call.rows.is_cuda:
        possible = torch.isin(operands.column_labels, operands.labels)
    for side in others:
        for tile, rows, _ in remote_tiles(call, engine, side, possible):
            engine.pair_positives_tile(tile, part(sums, rows), None)
    count = call.pair_counts[0].clamp(min=1)
    return sums.loss / count, sums.negative_prob / count


def _possible_positives(
    call: Call, engine: Engine, operands: Operands
) -> tuple[Operands, Tensor | None]:
    """Rows and columns visited by the positives' pass, and the places of its rows; None: all.

    In-batch rows that have a positive, those of one identity next to each other: all but the
    tiles around the diagonal are free of positives. Against a memory the columns of identities
    that occur among the rows: often one in thousands.
    """
    labels, column_labels = operands.labels, operands.column_labels
    values = operands.variables
    if call.columns is None:
        some = torch.nonzero(call.valid_rows).flatten()
        order = some[labels[some].argsort(stable=True)]
        unit, _ = engine.normalize_rows(call.rows, 0, len(order), order)
        place, ordered = order + operands.own, labels[order]
        values = values and values.at(place, place)
        return Operands(unit, ordered, ordered, sorted=True, variables=values), order
    if call.self_offset is not None or call.both:
        # The pair that is left out, or the column that has a loss, is known by its place.
        return operands, None
    index = torch.nonzero((column_labels >= 0) & torch.isin(column_labels, labels)).flatten()
    values = values and values.at(None, index)
    return Operands(operands.unit, labels, column_labels[index], index, variables=values), None
