"""The images of every batch: a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.balanced import balanced_order

Rows = NDArray[np.int64]


def epoch_order(
    labels: Rows,
    *,
    seed: int,
    epoch: int,
    images_per_identity: int = 0,
    sampler: str = "shuffle",
    batch_size: int = 0,
) -> Rows:
    """The images of an epoch in order, the same on every process.

    ``shuffle``: a permutation. With ``images_per_identity`` = k > 1, images of one identity come in
    runs of k (a last run may be shorter), so that a batch holds positives for the pair loss
    whatever the data's size. ``balanced``: as many full batches of ``batch_size``, each with
    k images of every identity in it; see train.data.balanced.
    """
    if sampler == "balanced":
        return balanced_order(
            labels,
            seed=seed,
            epoch=epoch,
            steps=steps_per_epoch(len(labels), batch_size),
            batch_size=batch_size,
            images_per_identity=images_per_identity,
        )
    # Seeds are mixed by a multiplication, so that neighboring runs share no epoch's order.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(labels), generator=generator).numpy()
    if images_per_identity <= 1:
        return order
    # Identities in order of their first image, each one's images in the shuffled order.
    _, first, owner = np.unique(labels[order], return_index=True, return_inverse=True)
    by_identity = np.argsort(first[owner], kind="stable")
    counts = np.bincount(owner)[np.argsort(first)]
    runs = -(-counts // images_per_identity)
    lengths = np.full(runs.sum(), images_per_identity)
    lengths[np.cumsum(runs) - 1] = counts - (runs - 1) * images_per_identity
    starts = np.cumsum(lengths) - lengths
    shuffled = torch.randperm(len(lengths), generator=generator).numpy()
    lengths = lengths[shuffled]
    within = np.arange(len(labels)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return order[by_identity[np.repeat(starts[shuffled], lengths) + within]]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Full batches only; fewer images than a batch make one batch of all of them."""
    return max(1, images // batch_size)


def rank_batches(order: Rows, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Rows:
    """This process's part of every global batch, (steps, images): disjoint from the others'."""
    batch = min(batch_size, len(order))
    local = batch // world_size
    steps = steps_per_epoch(len(order), batch_size)
    whole = order[: steps * batch].reshape(steps, batch)
    return whole[:, rank * local : (rank + 1) * local]
