"""How many positives and negatives a label has, by sorting."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_counts(labels: Tensor, others: Tensor, self_offset: int | None) -> tuple[Tensor, Tensor]:
    """(N,) numbers of the positives and of the negatives of each label among (M,) others."""
    ordered = others.sort().values
    first = torch.searchsorted(ordered, labels)
    positives = torch.searchsorted(ordered, labels, right=True) - first
    negatives = (others >= 0).sum() - positives
    if others is labels and self_offset == 0:
        # The pair that is left out is a row with itself.
        positives = positives - 1
    elif self_offset is not None and labels.numel() and others.numel():
        place = torch.arange(labels.numel(), device=labels.device) + self_offset
        inside = (place >= 0) & (place < others.numel())
        left_out = torch.where(inside, others[place.clamp(0, others.numel() - 1)], -1)
        positives = positives - (left_out == labels).to(torch.int64)
        negatives = negatives - ((left_out >= 0) & (left_out != labels)).to(torch.int64)
    ignored = labels == -1
    return positives.masked_fill(ignored, 0), negatives.masked_fill(ignored, 0)
