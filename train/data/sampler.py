"""Which images make up which batch: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def epoch_order(
    labels: Sequence[int], *, seed: int, epoch: int, images_per_identity: int = 0
) -> list[int]:
    """A permutation of the images, the same on every process.

    With ``images_per_identity`` = k > 1, images of one identity come in runs of k (a last run
    may be shorter), so that a batch holds positives for the pair loss whatever the data's size.
    """
    # Seeds are mixed by a multiplication, so that neighbouring runs share no epoch's order.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(labels), generator=generator).tolist()
    if images_per_identity <= 1:
        return order
    by_identity: dict[int, list[int]] = {}
    for i in order:
        by_identity.setdefault(labels[i], []).append(i)
    runs = [
        rows[k : k + images_per_identity]
        for rows in by_identity.values()
        for k in range(0, len(rows), images_per_identity)
    ]
    shuffled = torch.randperm(len(runs), generator=generator).tolist()
    return [i for r in shuffled for i in runs[r]]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches only; fewer images than a batch make one batch of all of them."""
    return max(1, images // batch_size)


def rank_batches(
    order: Sequence[int], *, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """This process's part of every global batch: a contiguous one, disjoint from the others'."""
    local = min(batch_size, len(order)) // world_size
    return [
        list(order[start + rank * local : start + (rank + 1) * local])
        for start in range(0, steps_per_epoch(len(order), batch_size) * batch_size, batch_size)
    ]
