"""Driver of ``logsumexps`` losses: a log-sum-exp of a row's positives, and one of its negatives.

With z the logits and P_i and N_i the two of row i, the row's loss is ``finish`` of them. A pass
over all tiles yields both sums, a second one the gradients: ``dL/dP exp(z - P) dz/dc`` of a
positive, ``dL/dN exp(z - N) dz/dc`` of a negative. In-batch each tile on or above the diagonal
serves both directions of its pairs: 0.5 GEMMs of N x N x D for each pass and 1 for what consumes
the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...losses import EMPTY, Finish, LossSpec
from . import towers
from .call import Call, Gradients, Result, not_finite
from .columns import norms_of_losses
from .engine import Engine, PairSums, PairWeights, part
from .pair_tiles import (
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
    """Log-sum-exps of the positives and of the negatives."""
    return 2


def forward(call: Call, engine: Engine, gradients: bool) -> Result:
    """Loss, and (2, num_losses) state: log-sum-exps P of the positives and N of the negatives."""
    prepared = operands_of(call, engine)
    _, inverse_norms, values = prepared
    state = log_of_sums(*_sums(call, engine, prepared))
    positives, negatives = _finite(state)
    of_rows = () if values is None else values.of_rows(call)
    per_row = _finish(call).value(positives, negatives, call.params, of_rows)
    doubtful = not_finite(call, norms_of_losses(call, engine, inverse_norms))
    per_row = torch.where(call.valid_rows, per_row, 0.0) + doubtful
    return result_of(call, engine, per_row, state, values)


def backward(call: Call, engine: Engine, state: Tensor, weights: Tensor) -> Gradients:
    """Gradients for (num_losses,) upstream gradients."""
    positives, negatives = _finite(state)
    prepared = operands_of(call, engine)
    of_rows = () if prepared.values is None else prepared.values.of_rows(call)
    slopes = _finish(call).slopes(positives, negatives, call.params, of_rows)
    by_sums, by_variables = torch.stack(slopes[:2]), slopes[2:]
    # Without pairs of a kind there is nothing to weigh, and the slope may be anything.
    live = call.valid_rows & (state != -torch.inf)
    factors, scale = split_factors(call, torch.where(live, weights * by_sums, 0.0))
    positive, negative = factors.unbind(0)
    log_positives, log_negatives = torch.where(live, state, torch.inf).unbind(0)
    of_pairs = PairWeights(log_negatives, negative, positive, log_positives)
    through_finish = [torch.where(call.valid_rows, weights * by, 0.0) for by in by_variables]
    return gradients_of_pairs(call, engine, prepared, of_pairs, scale, through_finish)


def _finish(call: Call) -> Finish:
    assert call.spec.finish is not None
    return call.spec.finish


def _finite(state: Tensor) -> tuple[Tensor, Tensor]:
    positives, negatives = torch.where(state == -torch.inf, EMPTY, state).unbind(0)
    return positives, negatives


def split_factors(call: Call, factors: Tensor) -> tuple[Tensor, Tensor | None]:
    """``call.split_weights`` of the (2, N) products with the slopes of ``finish``."""
    if call.compute_dtype != torch.float16:
        return factors, None
    everyone = factors.abs().T
    if call.ranks is not None and call.columns is None:
        everyone = call.ranks.gather(everyone.contiguous())
    elif call.towers is not None:
        everyone = torch.cat(towers.gathered(call, everyone))
    if everyone.numel() == 0:
        return factors, None
    scale = everyone.max().clamp_min(torch.finfo(torch.float32).tiny)
    return factors / scale, scale


def _sums(call: Call, engine: Engine, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """(2, num_losses) maxima and totals, of the positives and of the negatives."""
    rows = call.rows
    size = 2, call.num_losses
    maximum = rows.new_full(size, -torch.inf, dtype=torch.float32)
    total = rows.new_zeros(size, dtype=torch.float32)
    sums = PairSums(maximum[1], total[1], maximum[0], total[0])
    others = others_of(call, engine, prepared)
    for tile, place, columns in tiles(call, engine, prepared.operands):
        engine.pair_sums_tile(tile, part(sums, place), other_side(call, tile, sums, columns))
    for side in others:
        for tile, place, _ in remote_tiles(call, engine, side):
            engine.pair_sums_tile(tile, part(sums, place), None)
    return maximum, total
