"""The classes that take part in a step: all positives of the batch and negatives drawn uniformly.

A permutation keyed by (seed, rank, step) orders the classes, the first ``num_sampled`` places are
the draw, and positives that lie behind it take the last places there that no positive holds. What
is left of the draw are the first negatives of the permutation, in its order: uniform given the
positives. Work and memory are O(K + N): no list of the classes is shuffled or marked.

The rows are left in the order of their places: a row is several cache lines long, so ascending
order would save its gatherers little. A sparse gradient needs it, see :func:`ascending`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .permutation import draw_key, first_classes, places_of


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
        index (K,) int64, distinct rows of the shard, K = max(num_sampled, distinct labels) or all
        of num_classes, in no particular order; positions (N,) int64, where in ``index`` each label
        is, labels below 0 as they are.
    """
    count = min(num_sampled, num_classes)
    key = draw_key(seed, rank, step)
    places, order = places_of(num_classes, key, labels).sort()
    known = places < num_classes
    first = torch.ones_like(known)
    first[1:] = places[1:] != places[:-1]
    first &= known
    if labels.numel() > count:
        count = max(count, int(first.sum()))

    free = _free_places(places, first, count)
    sorted_labels = labels[order]
    found = torch.where(places < count, places, torch.where(known, free, sorted_labels))
    positions = torch.empty_like(labels).scatter_(0, order, found)
    # Rows without a class write to one more place, labels at their own place what is there.
    drawn = labels.new_empty(count + 1)
    drawn[:count] = first_classes(num_classes, key, count, labels.device)
    drawn.scatter_(0, torch.where(known, found, count), sorted_labels)
    return drawn[:count], positions


def _free_places(places: Tensor, first: Tensor, count: int) -> Tensor:
    """Where the places from ``count`` on go: the j-th of them to the j-th free place from the top.

    Args:
        places: (N,) ascending, with repetitions.
        first: (N,) whether a place is a class's and has not occurred before.
        count: places of the draw; at least as many as classes.

    Returns:
        (N,) int64, of use where ``places`` >= ``count`` is a class's.
    """
    inside = places < count
    taken = torch.cumsum(first & inside, 0)
    behind = torch.cumsum(first & ~inside, 0) - 1
    # The f-th free place from the bottom is f + t with the first t taken places below it. Taken
    # place t (from 0) has places[t] - t free ones below it, which does not decrease with t.
    free_below = torch.where(inside, places - (taken - 1), count)
    total = taken[-1:] if len(taken) else taken.new_zeros(1)
    wanted = count - total - 1 - behind
    before = torch.searchsorted(free_below, wanted, right=True)
    return wanted + torch.cat([taken.new_zeros(1), taken])[before]


def ascending(index: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The same draw with ``index`` in ascending order: that of a coalesced sparse gradient.

    Torch adds two coalesced gradients by merging their indices, which must ascend for that.
    """
    index, order = index.sort()
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    if not places.numel():
        return index, positions
    return index, torch.where(positions < 0, positions, places[positions.clamp(min=0)])
