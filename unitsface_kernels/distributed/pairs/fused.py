"""Losses across ranks by the streaming backends: gradients, and what they take from every rank.

What every rank makes of its loss is averaged over ranks, as data parallelism does with gradients:
the objective is F = (1/W) sum_r f_r(loss on rank r). With the upstream gradients a_r = f_r', a row
i has the weight w_i = sum_r a_r (divided by the counted rows for the mean), or its own upstream
gradient if losses are not reduced. Then

- W dF/dx_i = the gradient of sum_k w_k L_k by x_i, which this rank computes whole, and from which
  data parallelism takes the W away;
- dF/db = (1/W) the gradient of sum_k w_k L_k by b, whose terms are added up over ranks; and so for
  a memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import Function

from ... import dispatch, ops
from ...autograd import Final
from ...backends.streaming import Call, Gradients, make_call
from ...losses import LossSpec
from ..collectives import Group, mean_over_ranks, ordered_sum, own_rank, sum_over_ranks
from .exchange import Exchange


@dataclass(frozen=True)
class Setting:
    """A call across ranks, but for its tensors.

    Attributes:
        spec, params, reduction, compute_dtype, skip_tolerance: as of ``streaming.Call``.
        self_offset: place of the own rows among the columns; None: no pair is left out.
        backend: that runs it.
        needs: whether rows, memory and threshold need a gradient, on every rank.
        group, counts, ring: as of :class:`Exchange`.
    """

    spec: LossSpec
    params: tuple[float, ...]
    reduction: str
    compute_dtype: torch.dtype
    skip_tolerance: float
    self_offset: int | None
    backend: str
    needs: tuple[bool, bool, bool]
    group: Group
    counts: Sequence[int]
    ring: bool

    def call(self, tensors: Sequence[Tensor | None], gathered: Tensor | None) -> Call:
        rows, row_labels, columns, column_labels, threshold = tensors
        assert rows is not None
        assert row_labels is not None
        call = make_call(
            rows,
            row_labels,
            columns,
            column_labels,
            None,
            self.self_offset,
            threshold,
            self.spec.name,
            self.params,
            self.reduction,
            self.compute_dtype,
            self.skip_tolerance,
            *self.needs,
        )
        exchange = Exchange(call.rows, self.counts, self.group, self.ring, gathered)
        return replace(call, ranks=exchange)


def fused_loss(
    setting: Setting,
    feats: Tensor,
    labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor,
    threshold: Tensor | None,
) -> Tensor:
    """Loss of own rows against those of all ranks, or against ``columns``, the memory.

    Args:
        setting: the call.
        feats, labels: (n, D), (n,) of this rank.
        columns: (M, D) memory, or None.
        column_labels: of the memory or, without one, of the rows of all ranks.
        threshold: (1,), or one per column.
    """
    return _PairLoss.apply(setting, feats, labels, columns, column_labels, threshold)


class _PairLoss(Function):
    @staticmethod
    def forward(ctx, setting: Setting, *tensors: Tensor | None) -> Tensor:
        call = setting.call(tensors, None)
        exchange = call.ranks
        assert isinstance(exchange, Exchange)
        counted = sum_over_ranks(call.counted_rows.sum(), setting.group)
        exchange.counted = counted.clamp(min=1).to(torch.float32)
        result, known = ops.forward(call, setting.backend)
        ctx.setting, ctx.known = setting, known
        kept = exchange.gathered if not known else None
        rows, row_labels, columns, column_labels, threshold = tensors
        columns, column_labels = ops.saved_columns(
            known, setting.spec.name, columns, column_labels, call.need_columns
        )
        ctx.save_for_backward(
            *(rows, row_labels, columns, column_labels, threshold),
            *(exchange.counted, kept, None if known else result.state),
            *result.gradients,
        )
        if setting.reduction == "none":
            return result.loss
        return ordered_sum(result.loss, setting.group)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        *tensors, counted, gathered, state, d_rows, d_columns, d_threshold = ctx.saved_tensors
        rows, _, columns, _, threshold = tensors
        inputs = (rows, columns, threshold)
        with torch.no_grad():
            if ctx.known:
                gradients = _scaled(ctx.setting, upstream, d_rows, d_columns, d_threshold)
            else:
                call = ctx.setting.call(tensors, gathered)
                gradients = _computed(ctx.setting, call, upstream, counted, state)
            found = [
                None if g is None or t is None else g.to(t.dtype).reshape(t.shape)
                for g, t in zip(gradients, inputs, strict=True)
            ]
        if torch.is_grad_enabled():
            found = Final.apply(upstream, *inputs, *found)[4:]
        return None, found[0], None, found[1], None, found[2]


def _scaled(
    setting: Setting,
    upstream: Tensor,
    d_rows: Tensor | None,
    d_columns: Tensor | None,
    d_threshold: Tensor | None,
) -> Gradients:
    """Gradients that the forward pass knew, for upstream gradients of one."""
    if setting.reduction == "none":  # against a memory, of which every rank has its own rows
        return None if d_rows is None else ops.times(d_rows, upstream), None, None
    # One message for the upstream gradients and for the threshold's.
    parts = [upstream.reshape(1)] + ([] if d_threshold is None else [d_threshold])
    sums = sum_over_ranks(torch.cat(parts), setting.group)
    total, share = sums[0], sums[0] / len(setting.counts)
    return (
        None if d_rows is None else d_rows * total,
        None if d_columns is None else sum_over_ranks(d_columns, setting.group) * share,
        None if d_threshold is None else sums[1:] * share,
    )


def _computed(
    setting: Setting, call: Call, upstream: Tensor, counted: Tensor, state: Tensor
) -> Gradients:
    exchange = call.ranks
    assert isinstance(exchange, Exchange)
    exchange.counted = counted
    own = setting.counts[own_rank(setting.group)]
    weights = upstream.to(torch.float32)
    if setting.reduction == "none":
        everyone = exchange.gather(weights) if call.columns is None else None
    else:
        weight = sum_over_ranks(weights, setting.group)
        if setting.reduction == "mean":
            weight = weight / counted
        weights = weight.expand(own)
        everyone = weight.expand(sum(setting.counts))
    if call.columns is None:
        assert everyone is not None
        exchange.weights = everyone.contiguous()
    backend = dispatch.load(setting.backend)
    d_rows, d_columns, d_threshold = backend.backward(call, state, weights.contiguous())
    return (
        d_rows,
        None if d_columns is None else mean_over_ranks(d_columns, setting.group),
        None if d_threshold is None else mean_over_ranks(d_threshold, setting.group),
    )
