"""Sums over the samples of all ranks that have a row's label, which pass by half a batch at a time.

A linear function of the samples: its derivative sums the gradients of all ranks' rows over the own
samples of their labels, and is the same function with the sides exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd import Function

from ..collectives import Group
from .exchange import passed_on

#: Values (m, D) of samples, their labels (m,) and those of rows (n,) -> (n, D), by row the sum over
#: the samples of its label.
Sums = Callable[[Tensor, Tensor, Tensor], Tensor]


class Side(NamedTuple):
    """Labels (n,) of the own samples, (T,) of those of all ranks, and how many every rank has."""

    own: Tensor
    everyone: Tensor
    counts: Sequence[int]


def matching_sums(values: Tensor, samples: Side, rows: Side, group: Group, sums: Sums) -> Tensor:
    """(m, D) values of the own samples -> (n, D): by own row the sum over all ranks' samples of its
    label; with their graph, differentiable any number of times.

    What a rank holds of others is never more than the largest batch.
    """
    return _Sums.apply(values, samples, rows, group, sums)


class _Sums(Function):
    @staticmethod
    def forward(ctx, values: Tensor, samples: Side, rows: Side, group: Group, sums: Sums) -> Tensor:
        ctx.arguments = rows, samples, group, sums
        blocks = passed_on(values.detach().contiguous(), samples.counts, group)
        total = sums(values.detach(), samples.own, rows.own)
        for place, block in blocks:
            total = total + sums(block, samples.everyone[place], rows.own)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Sums.apply(gradient, *ctx.arguments), None, None, None, None
