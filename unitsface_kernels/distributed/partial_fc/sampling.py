"""The classes that take part in a step: all positives of the batch and negatives drawn uniformly.

A permutation keyed by (seed, rank, step) orders the classes, and the first negatives in its order
take part: uniform given the positives. Those lie in the first places, among which there are some
positives as well; the other positives take the places that are left. Work and memory are
O(K log K + N log N): no list of the classes is shuffled or marked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from .permutation import draw_key, drawn_classes, places_of


def sample_classes(
    labels: Tensor, num_classes: int, num_sampled: int, *, seed: int, rank: int, step: int
) -> tuple[Tensor, Tensor]:
    """Rows of the shard that take part in a step, and where among them the labels are.

    The same on every device. On CUDA nothing waits for the device if N <= num_sampled; otherwise
    the number of distinct labels is awaited once, since it may exceed num_sampled.

    Args:
        labels: (N,) int64 in [0, num_classes); below 0: no class of this shard.
        num_classes: classes of the shard.
        num_sampled: how many take part; more if there are more distinct labels.
        seed: of the run.
        rank: each rank draws its own.
        step: number of the step.

    Returns:
        index (K,) int64, distinct rows of the shard in ascending order, as a coalesced sparse
        gradient has them, K = max(num_sampled, distinct labels) or all of num_classes; positions
        (N,) int64, where in ``index`` each label is, labels below 0 as they are.
    """
    drawn = draw_classes(labels, num_classes, num_sampled, draw_key(seed, rank, step))
    index = drawn.sort().values
    kernels = dispatch.draw_kernels(labels.device)
    if kernels is not None:
        return index, kernels.positions(index, labels)
    return index, torch.where(labels < 0, labels, torch.searchsorted(index, labels))


def draw_classes(labels: Tensor, num_classes: int, num_sampled: int, key: int) -> Tensor:
    """The rows of :func:`sample_classes` (K,), negatives in the order of the permutation ``key``"""
    count = min(num_sampled, num_classes)
    positives = _distinct(places_of(num_classes, key, labels).sort().values, num_classes)
    if labels.numel() > count:
        count = max(count, int((positives < num_classes).sum()))
    return drawn_classes(num_classes, key, count, positives)


def _distinct(places: Tensor, size: int) -> Tensor:
    """Ascending places, each once: that of one that is none, or not the first, is ``size``, behind
    all others.
    """
    kernels = dispatch.draw_kernels(places.device)
    if kernels is not None and len(places) <= kernels.MOST_LABELS:
        return kernels.distinct(places, size)
    again = places[1:] == places[:-1]
    places[1:].masked_fill_(again, size)
    return places.sort().values
