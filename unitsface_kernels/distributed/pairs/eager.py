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
from ...backends.streaming import CallConfig, CallTensors
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


def replicated(value: Tensor, group: Group) -> Tensor:
    """A tensor that is the same on every rank, and gets the mean of their gradients."""
    return _Replica.apply(value, group)


def gathered(values: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """(T,) or (T, D) values of all ranks' samples, with their graph."""
    if values.dim() == 1:
        return _Gathered.apply(values[:, None], counts, group)[:, 0]
    return _Gathered.apply(values, counts, group)


def eager_loss(setting: Setting, tensors: CallTensors) -> Tensor:
    """The loss of :func:`fused_loss`; other ranks' gradients of the threshold are not followed."""
    config, feats = setting.config, tensors.rows
    if setting.column_counts is not None:
        return _eager_towers(setting, tensors)
    if tensors.columns is None:
        wide = feats.to(torch.promote_types(feats.dtype, torch.float32))
        tensors = tensors._replace(columns=_Gathered.apply(wide, setting.counts, setting.group))
    total = partial(sum_over_ranks, group=setting.group)
    per_row = reference.similarity_loss(
        replace(config, reduction="none"), *tensors, over_ranks=total
    )
    if config.reduction == "none":
        return per_row
    return reduced(per_row, _valid(config, tensors), config.reduction, setting.group)


def _valid(config: CallConfig, tensors: CallTensors) -> Tensor:
    labels, column_labels = tensors.row_labels, tensors.column_labels
    assert column_labels is not None
    positive, negative = reference.pair_masks(labels, column_labels, config.self_offset)
    return reference.valid_rows(config.spec, labels, positive, negative)


def reduced(per_row: Tensor, valid: Tensor, reduction: str, group: Group) -> Tensor:
    """The sum or the mean of the losses of all ranks; ``valid``: those that there are."""
    total = _Summed.apply(per_row.sum(), group)
    if reduction == "sum":
        return total
    return total / sum_over_ranks(valid.sum(), group).clamp(min=1)


def _eager_towers(setting: Setting, tensors: CallTensors) -> Tensor:
    """Own rows against the columns of all ranks, and own columns against their rows."""
    rows, row_labels, columns, column_labels = tensors[:4]
    assert columns is not None
    assert column_labels is not None
    assert setting.column_counts is not None
    wide = torch.promote_types(rows.dtype, torch.float32)
    # 0 times the NaN of an ignored one would be NaN in every gradient.
    towers = [
        (torch.where((labels == -1)[:, None], 0.0, own.to(wide)), labels, counts)
        for own, labels, counts in (
            (rows, row_labels, setting.counts),
            (columns, column_labels, setting.column_counts),
        )
    ]
    config = replace(setting.config, reduction="none", both=False)
    losses, valid = [], []
    for (own, labels, _), (others, their_labels, counts) in (towers, towers[::-1]):
        one_way = tensors._replace(
            rows=own,
            row_labels=labels,
            columns=_Gathered.apply(others, counts, setting.group),
            column_labels=start_gather_rows(their_labels, counts, setting.group)(),
        )
        losses.append(reference.similarity_loss(config, *one_way))
        valid.append(_valid(config, one_way))
    if setting.config.reduction == "none":
        return torch.cat(losses)
    return reduced(torch.cat(losses), torch.cat(valid), setting.config.reduction, setting.group)
