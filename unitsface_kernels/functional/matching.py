"""Samples of the same identity, in O(N + M) memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Matching:
    """Identities of N rows and M columns as the fused functions take them, and their counts.

    Labels may be any integers, -1 and others below 0 included, which the fused functions reserve.
    So an identity becomes its first place among the sorted labels of the columns; one that no
    column has becomes M. Sorting and searching are free of device-to-host synchronization.

    Attributes:
        rows, columns: (N,) in [0, M] and (M,) in [0, M), equal where the labels are.
        positives, negatives: (N,) numbers of columns with the row's identity and with another.
        meaningful: () whether the loss has a value other than 0. As in the original: there are
            positive and negative pairs, and more than a single one of either kind.
    """

    rows: Tensor
    columns: Tensor
    positives: Tensor
    negatives: Tensor
    meaningful: Tensor


def match(labels: Tensor, column_labels: Tensor, holds_itself: bool) -> Matching:
    """``holds_itself``: each row is among the columns, and is not its own positive."""
    count = column_labels.shape[0]
    labels = labels.to(torch.int64).contiguous()
    column_labels = column_labels.to(torch.int64).contiguous()
    ordered = column_labels.sort().values
    first = torch.searchsorted(ordered, labels)
    same = torch.searchsorted(ordered, labels, right=True) - first
    columns = torch.searchsorted(ordered, column_labels)
    positives, negatives = same - int(holds_itself), count - same
    p, n = positives.sum(), negatives.sum()
    meaningful = (p > 0) & (n > 0) & (p + n > 2)
    return Matching(first.where(same > 0, count), columns, positives, negatives, meaningful)


def sums_of_matching(values: Tensor, matching: Matching, plain: bool = False) -> Tensor:
    """(M, D) values of the columns -> (N, D): for each row the sum over its identity's columns.

    ``plain`` forms the N x M matrix: differentiable any number of times, and by transforms.
    """
    if plain:
        same = matching.rows[:, None] == matching.columns
        with torch.autocast(values.device.type, enabled=False):
            return same.to(values.dtype) @ values
    bound = matching.columns.shape[0] + 1
    return _SumsOfMatching.apply(values, matching.columns, matching.rows, bound)


class _SumsOfMatching(torch.autograd.Function):
    """Matmul with the N x M matrix of equal identities.

    Its gradient is the matmul with the transpose: the same function with the sides exchanged.
    Both add in a fixed order on every device, unlike the backward pass of indexing.
    """

    @staticmethod
    def forward(ctx, values: Tensor, source: Tensor, target: Tensor, bound: int) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.bound = bound
        return _sums(values, source, target, bound)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        source, target = ctx.saved_tensors
        return _sums(gradient, target, source, ctx.bound), None, None, None


def _sums(values: Tensor, source: Tensor, target: Tensor, bound: int) -> Tensor:
    """Sums of the rows of ``values`` whose ``source`` is k, for every k of ``target`` < bound."""
    if len(values) == 0:
        return values.new_zeros(len(target), values.shape[1])
    ordered, order = source.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(bound, device=values.device))
    return F.embedding_bag(order, values, offsets, mode="sum")[target]
