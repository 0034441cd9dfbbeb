"""The newest feature of every identity, to compare a batch with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import validate
from .collectives import gather_rows


def newest_rows(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For every row the slot it writes to, and the row whose value belongs there, -1: keep.

    Of an identity that occurs twice the last row wins. Every row writes the value of the last one,
    so that no order of writes decides; ignored rows write to the first slot what belongs there.
    Work is O(N), memory O(N + count).

    Args:
        labels: (N,) int64 in [0, count), -1 ignored.
        count: slots.
    """
    places = torch.arange(labels.numel(), device=labels.device)
    slots = labels.clamp(min=0)
    newest = torch.full((count,), -1, dtype=torch.int64, device=labels.device)
    newest = newest.scatter_reduce(0, slots, torch.where(labels >= 0, places, -1), "amax")
    return slots, newest[slots]


class FeatureMemory(nn.Module):
    """Newest feature of each identity, detached (the sample memory of UniTSFace).

    Pass ``memory=memory.features, memory_labels=memory.labels`` to a pair loss, then call
    :meth:`update`; UniTSFace compares first and updates afterwards, and starts comparing when
    every identity has been seen once.

    Args:
        num_identities: K.
        dim: D.

    Attributes:
        features: (K, D) buffer, not normalised; row k belongs to identity k.
        labels: (K,) int64 buffer, k once identity k has been seen, -1 before.
    """

    features: Tensor
    labels: Tensor

    def __init__(self, num_identities: int, dim: int) -> None:
        super().__init__()
        validate.positive_int("num_identities", num_identities)
        validate.positive_int("dim", dim)
        self.register_buffer("features", torch.zeros(num_identities, dim))
        self.register_buffer("labels", torch.full((num_identities,), -1, dtype=torch.int64))

    @torch.no_grad()
    def update(self, feats: Tensor, labels: Tensor) -> None:
        """Stores the features of a batch; of an identity that occurs twice the last one.

        In an initialised process group every rank calls it and stores the batches of all ranks
        in rank order, so that the memories of all ranks stay identical; batches may differ in
        size and be empty.

        Args:
            feats: (N, D) features.
            labels: (N,) integer identities in [0, K); -1 is not stored.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a wrong shape, device or range.
        """
        validate.features("feats", feats)
        validate.labels("labels", labels, feats.shape[0], feats)
        validate.width("feats", feats, self.features.shape[1])
        validate.same_device("feats", feats, "the memory", self.features)
        count = self.labels.shape[0]
        if not torch.compiler.is_compiling():
            validate.in_range("labels", labels, -1, count)
        feats, labels = gather_rows(feats.to(self.features.dtype), labels.to(torch.int64))
        if labels.numel() == 0:
            return
        slots, newest = newest_rows(labels, count)
        known = newest >= 0
        kept, kept_labels = self.features[slots], self.labels[slots]
        newer = torch.where(known[:, None], feats[newest.clamp(min=0)], kept)
        self.features.index_copy_(0, slots, newer)
        self.labels.index_copy_(0, slots, torch.where(known, slots, kept_labels))

    def reset(self) -> None:
        """Forgets everything."""
        self.features.zero_()
        self.labels.fill_(-1)

    def extra_repr(self) -> str:
        return f"num_identities={self.features.shape[0]}, dim={self.features.shape[1]}"
