"""Losses across ranks in eager PyTorch: the oracle, whose gradients come from autograd.

Collectives as autograd functions; with them the gradients are those of the sum over ranks of what
every rank makes of its loss, W times the objective of ``fused.py``. Their derivatives are
collectives again, so that there are derivatives of any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from ...backends import reference
from ...losses import LossSpec
from ..collectives import (
    Group,
    mean_over_ranks,
    ordered_sum,
    start_gather_rows,
    start_scatter_sums,
    sum_over_ranks,
)


class _Gathered(Function):
    """(T, D) rows of all ranks."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return start_gather_rows(rows, counts, group)()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Scattered.apply(gradient, ctx.counts, ctx.group), None, None


class _Scattered(Function):
    """(n, D) own rows of the sum of all ranks' (T, D)."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return start_scatter_sums(rows.clone(), counts, group)()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Gathered.apply(gradient, ctx.counts, ctx.group), None, None


class _Summed(Function):
    """The sum of all ranks' numbers."""

    @staticmethod
    def forward(ctx, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return ordered_sum(value, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Summed.apply(gradient, ctx.group), None


class _Replica(Function):
    """What is the same on every rank; so is its gradient, the mean of what ranks find."""

    @staticmethod
    def forward(ctx, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Mean.apply(gradient, ctx.group), None


class _Mean(Function):
    """The mean of all ranks' tensors."""

    @staticmethod
    def forward(ctx, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return mean_over_ranks(value, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Mean.apply(gradient, ctx.group), None


def replica(value: Tensor | None, group: Group) -> Tensor | None:
    return None if value is None else _Replica.apply(value, group)


def eager_loss(
    spec: LossSpec,
    params: tuple[float, ...],
    feats: Tensor,
    labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor,
    self_offset: int | None,
    threshold: Tensor | None,
    reduction: str,
    counts: Sequence[int],
    group: Group,
) -> Tensor:
    """As :func:`fused_loss`; the threshold's gradient is followed as if no other rank had one."""
    if columns is None:
        wide = feats.to(torch.promote_types(feats.dtype, torch.float32))
        columns = _Gathered.apply(wide, counts, group)
    per_row = reference.similarity_loss(
        spec,
        params,
        feats,
        labels,
        columns,
        column_labels,
        None,
        self_offset,
        threshold,
        "none",
    )
    if reduction == "none":
        return per_row
    total = _Summed.apply(per_row.sum(), group)
    if reduction == "sum":
        return total
    positive, negative = reference.pair_masks(labels, column_labels, self_offset)
    counted = reference.counted_rows(spec, labels, positive, negative).sum()
    return total / sum_over_ranks(counted, group).clamp(min=1)
