"""Which images make up which batch: a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def epoch_order(labels: Rows, *, seed: int, epoch: int, images_per_identity: int = 0) -> Rows:
    """A permutation of the images, the same on every process.

    With ``images_per_identity`` = k > 1, images of one identity come in runs of k (a last run
    may be shorter), so that a batch holds positives for the pair loss whatever the data's size.
    """
    # Seeds are mixed by a multiplication, so that neighbouring runs share no epoch's order.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(labels), generator=generator).numpy()
    if images_per_identity <= 1:
        return order
    by_identity: dict[int, list[int]] = {}
    for i in order.tolist():
        by_identity.setdefault(int(labels[i]), []).append(i)
    runs = [
        rows[k : k + images_per_identity]
        for rows in by_identity.values()
        for k in range(0, len(rows), images_per_identity)
    ]
    shuffled = torch.randperm(len(runs), generator=generator).tolist()
    return np.array([i for r in shuffled for i in runs[r]], dtype=np.int64)


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
