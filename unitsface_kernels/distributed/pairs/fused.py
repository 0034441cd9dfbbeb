"""Losses across ranks by the streaming backends: gradients, and what they take from every rank.

The functions of the ranks' losses are averaged over ranks, as data parallelism does with gradients:
the objective is F = (1/W) sum_r f_r(loss on rank r). With the upstream gradients a_r = f_r', a row
i has the weight w_i = sum_r a_r (over the number of valid rows for the mean), or its own upstream
gradient if losses are not reduced. Then

- W dF/dx_i = the gradient of sum_k w_k L_k by x_i, which this rank computes whole, and from which
  data parallelism takes the W away;
- dF/db = (1/W) the gradient of sum_k w_k L_k by b, whose terms are added up over ranks; and so for
  a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ... import passes
from ...backends.streaming import Call, CallTensors, Gradients, Towers, make_call
from ..collectives import mean_over_ranks, ordered_sum, own_rank, sum_over_ranks
from .exchange import Exchange, Setting


def fused_loss(setting: Setting, tensors: CallTensors) -> Tensor:
    """Loss of own rows against those of all ranks, or against a memory.

    Args:
        setting: the call.
        tensors: rows and their labels are those of this rank, columns the memory or None;
            column labels are of the memory or, without one, of the rows of all ranks, and so are
            thresholds per column.
    """
    return _PairLoss.apply(setting, *tensors)


def _call(
    setting: Setting, tensors: CallTensors, gathered: Sequence[Tensor | None] = (None, None)
) -> tuple[Call, list[Exchange]]:
    """The call, and its exchanges of rows and, if every rank has its own, of columns.

    Args:
        setting, tensors: as of :func:`fused_loss`.
        gathered: features of all ranks, if an earlier pass has gathered them.
    """
    call = make_call(setting.config, tensors)
    rows = Exchange(call.rows, setting, gathered[0])
    if setting.column_counts is None:
        return replace(call, ranks=rows), [rows]
    assert call.columns is not None
    assert call.column_labels is not None
    columns = Exchange(call.columns, setting.of_columns(), gathered[1])
    labels = rows.gather(call.row_labels), columns.gather(call.column_labels)
    return replace(call, towers=Towers(rows, columns, *labels)), [rows, columns]


class _PairLoss(Function):
    @staticmethod
    def forward(ctx, setting: Setting, *inputs: Any) -> Tensor:
        tensors, config = CallTensors(*inputs), setting.config
        call, exchanges = _call(setting, tensors)
        num_valid_rows = sum_over_ranks(call.valid_rows.sum(), setting.group)
        num_valid_rows = num_valid_rows.clamp(min=1).to(torch.float32)
        exchanges[0].num_valid_rows = num_valid_rows
        result, known = passes.forward_with_known(call)
        ctx.setting, ctx.known = setting, known
        ctx.in_batch = tensors.columns is None
        gathered = [None if known else exchange.gathered for exchange in exchanges]
        gathered = [*gathered, None][:2]
        ctx.save_for_backward(
            *passes.tensors_to_save(config, tensors, known),
            *(num_valid_rows, *gathered, None if known else result.state),
            *Gradients(*result.gradients),
        )
        if config.reduction == "none":
            return result.loss
        return ordered_sum(result.loss, setting.group)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        *saved, num_valid_rows, rows, columns, state = ctx.saved_tensors[: -len(Gradients._fields)]
        found = Gradients(*ctx.saved_tensors[-len(Gradients._fields) :])
        tensors = CallTensors(*saved)
        with torch.no_grad():
            if ctx.known:
                gradients = _scaled(ctx.setting, upstream, found, ctx.in_batch)
            else:
                call, exchanges = _call(ctx.setting, tensors, (rows, columns))
                exchanges[0].num_valid_rows = num_valid_rows
                gradients = _computed(ctx.setting, call, exchanges, upstream, state)
            gradients = passes.of_inputs(tensors, *gradients)
        if torch.is_grad_enabled():
            gradients = passes.final(tensors, upstream, gradients)
        return passes.by_input(gradients)


def _scaled(setting: Setting, upstream: Tensor, known: Gradients, in_batch: bool) -> Gradients:
    """Gradients from the forward pass, for upstream gradients of one."""
    d_rows, d_columns, d_threshold, d_variables = known
    if setting.config.reduction == "none":  # against a memory, of which every rank has its own rows
        return passes.times(Gradients(d_rows), upstream)
    # One message for the upstream gradients and for the threshold's.
    parts = [upstream.reshape(1)] + ([] if d_threshold is None else [d_threshold])
    sums = sum_over_ranks(torch.cat(parts), setting.group)
    total, mean = sums[0], sums[0] / len(setting.counts)
    if d_columns is not None and setting.column_counts is None:
        d_columns = sum_over_ranks(d_columns, setting.group) / len(setting.counts)
    return Gradients(
        None if d_rows is None else d_rows * total,
        None if d_columns is None else d_columns * total,
        None if d_threshold is None else sums[1:] * mean,
        _mean_variables(setting, in_batch, d_variables, total),
    )


def _mean_variables(
    setting: Setting, in_batch: bool, gradient: Tensor | None, factor: Tensor | float = 1.0
) -> Tensor | None:
    """The ranks' mean gradient of variables that all of them have; of rows each rank's own."""
    if gradient is None:
        return None
    variables = setting.config.spec.variables
    scalars, of_rows = (
        sum(v.side == side and v.given for v in variables) for side in ("scalar", "row")
    )
    count = sum(setting.counts) if in_batch else setting.counts[own_rank(setting.group)]
    first, rows, last = gradient.tensor_split([scalars, scalars + of_rows * count])
    shared = mean_over_ranks(torch.cat([first, last]), setting.group)
    return torch.cat([shared[:scalars], rows, shared[scalars:]]) * factor


def _computed(
    setting: Setting, call: Call, exchanges: list[Exchange], upstream: Tensor, state: Tensor
) -> Gradients:
    weights, shared = upstream.to(torch.float32), setting.column_counts is None
    if call.reduction != "none":
        weights = sum_over_ranks(weights, setting.group)
        if call.reduction == "mean":
            weights = weights / exchanges[0].num_valid_rows
    if call.columns is None or not shared:
        _exchange_weights(call, exchanges, weights)
    weights = weights.expand(call.num_losses).contiguous()
    d_rows, d_columns, d_threshold, d_variables = passes.backward(call, state, weights)
    if d_columns is not None and shared:
        d_columns = mean_over_ranks(d_columns, setting.group)
    return Gradients(
        d_rows,
        d_columns,
        None if d_threshold is None else mean_over_ranks(d_threshold, setting.group),
        _mean_variables(setting, call.columns is None, d_variables),
    )


def _exchange_weights(call: Call, exchanges: list[Exchange], weights: Tensor) -> None:
    """Gives the exchanges the weights of all ranks' losses; ``weights``: (), or of the own ones."""
    if weights.dim() == 0:
        for exchange in exchanges:
            exchange.weights = weights.expand(exchange.size).contiguous()
        return
    rows = len(call.rows)
    for exchange, own in zip(exchanges, (weights[:rows], weights[rows:]), strict=False):
        exchange.weights = exchange.gather(own.contiguous())
