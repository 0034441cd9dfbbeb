"""The newest feature of every identity, to compare a batch with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import validate
from .compiling import never_compiled
from .distributed.agreement import agree
from .distributed.collectives import Group, start_gather_rows, world_size


def all_finite(feats: Tensor, labels: Tensor | None = None) -> Tensor:
    """() bool, on the device: whether features may be stored beyond their step.

    With ``labels``, the features of ignored rows (-1) are not checked.

    A batch with NaN or infinity is not stored at all: a gradient scaler skips its step, and all
    ranks, which have the same gathered batch, decide the same.
    """
    finite = feats.isfinite()
    if labels is not None:
        finite = finite.all(dim=1) | (labels < 0)
    return finite.all()


def nan_unless(finite: Tensor, dtype: torch.dtype) -> Tensor:
    """() 0, or NaN unless ``finite``; added to the loss of a batch that is not finite."""
    return torch.zeros_like(finite, dtype=dtype).masked_fill_(~finite, torch.nan)


def newest_rows(labels: Tensor, feats: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For every row the slot to write, and the row whose value to write there; -1: keep.

    Of an identity that occurs twice the last row is stored. Every row of the identity writes that
    value, so the order of writes has no effect; ignored rows write the value of the first slot
    to it. Work is O(N), memory O(N + count).

    Args:
        labels: (N,) int64 in [0, count), -1 ignored.
        feats: (N, D) rows to store; unless all are finite, none is.
        count: slots.
    """
    places = torch.arange(labels.numel(), device=labels.device)
    slots = labels.clamp(min=0)
    newest = torch.full((count,), -1, dtype=torch.int64, device=labels.device)
    newest = newest.scatter_reduce(0, slots, torch.where(labels >= 0, places, -1), "amax")
    return slots, newest[slots].where(all_finite(feats), -1)


class FeatureMemory(nn.Module):
    """Newest feature of each identity, detached (the sample memory of UniTSFace).

    Pass ``memory=memory.features, memory_labels=memory.labels`` to a pair loss, then call
    :meth:`update`, before or after the backward pass; UniTSFace compares first and updates
    afterwards, and starts comparing when every identity has been seen once.

    Args:
        num_identities: K.
        dim: D.

    Attributes:
        features: (K, D) buffer, not normalized; row k belongs to identity k.
        labels: (K,) int64 buffer, k once identity k has been seen, -1 before.

    Raises:
        TypeError, ValueError: num_identities or dim is not an int in [1, 2^31).
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
    def update(self, feats: Tensor, labels: Tensor, group: Group = None) -> None:
        """Stores the features of a batch; of an identity that occurs twice the last one.

        In an initialized process group every rank calls it and stores the batches of all ranks
        in rank order, so that the memories of all ranks stay identical; batches may differ in
        size and be empty. A mistake on one rank is an error on all, and nothing is stored. If the
        batch of any rank holds NaN or infinity, none is stored.

        Args:
            feats: (N, D) features.
            labels: (N,) integer identities in [0, K); -1 is not stored.
            group: the ranks whose batches are stored; None: all.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a wrong shape, device or range.
        """
        validate.process_group("group", group)
        if world_size(group) == 1:
            feats, labels = self._checked(feats, labels)
        else:
            feats, labels = self._of_all_ranks(feats, labels, group)
        if labels.numel() == 0:
            return
        slots, newest = newest_rows(labels, feats, self.labels.shape[0])
        known = newest >= 0
        kept, kept_labels = self.features[slots], self.labels[slots]
        newer = torch.where(known[:, None], feats[newest.clamp(min=0)], kept)
        self.features.index_copy_(0, slots, newer)
        self.labels.index_copy_(0, slots, torch.where(known, slots, kept_labels))

    def _checked(self, feats: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A checked batch in the memory's dtypes."""
        validate.features("feats", feats)
        validate.labels("labels", labels, feats.shape[0], feats)
        validate.width("feats", feats, self.features.shape[1])
        validate.same_device("feats", feats, "the memory", self.features)
        if not torch.compiler.is_compiling():
            validate.in_range("labels", labels, -1, self.labels.shape[0])
        return feats.to(self.features.dtype), labels.to(torch.int64)

    @never_compiled
    def _of_all_ranks(self, feats: Tensor, labels: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        def check():
            batch = self._checked(feats, labels)
            shape = tuple(self.features.shape)
            return batch, feats.shape[0], {"the memory": f"{self.features.dtype} of shape {shape}"}

        batch, counts = agree(check, group)
        pending = [start_gather_rows(tensor, counts, group) for tensor in batch]
        return pending[0](), pending[1]()

    def reset(self) -> None:
        """Empties the memory."""
        self.features.zero_()
        self.labels.fill_(-1)

    def extra_repr(self) -> str:
        return f"num_identities={self.features.shape[0]}, dim={self.features.shape[1]}"
