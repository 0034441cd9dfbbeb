"""Losses across ranks in eager PyTorch: the oracle, whose gradients come from autograd.

Collectives are autograd functions. The gradients are those of the sum over ranks of every rank's
function of its loss: W times the objective of ``fused.py``. Derivatives of the collectives are
collectives again, so that there are derivatives of any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function

from ...backends import reference
from ...backends.streaming import CallTensors
from ..collectives import (
    Group,
    mean_over_ranks,
    ordered_sum,
    start_gather_rows,
    start_scatter_sums,
    sum_over_ranks,
)
from .exchange import Setting


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
    """A tensor that is the same on every rank; so is its gradient, the mean of the ranks' own."""

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


def gathered(values: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """(T,) values of all ranks' samples."""
    return _Gathered.apply(values[:, None], counts, group)[:, 0]


def eager_loss(setting: Setting, tensors: CallTensors) -> Tensor:
    """As :func:`fused_loss`; the threshold's gradient is followed as if no other rank had one."""
    config, feats = setting.config, tensors.rows
    if tensors.columns is None:
        wide = feats.to(torch.promote_types(feats.dtype, torch.float32))
        tensors = tensors._replace(columns=_Gathered.apply(wide, setting.counts, setting.group))
    total = partial(sum_over_ranks, group=setting.group)
    per_row = reference.similarity_loss(
        replace(config, reduction="none"), *tensors, over_ranks=total
    )
    if config.reduction == "none":
        return per_row
    total = _Summed.apply(per_row.sum(), setting.group)
    if config.reduction == "sum":
        return total
    labels, column_labels = tensors.row_labels, tensors.column_labels
    assert column_labels is not None
    positive, negative = reference.pair_masks(labels, column_labels, config.self_offset)
    valid = reference.valid_rows(config.spec, labels, positive, negative).sum()
    return total / sum_over_ranks(valid, setting.group).clamp(min=1)
