"""Moving statistics of the norms of rows, in operations of Torch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def norm_sums(feats: Tensor, labels: Tensor, low: float, high: float) -> Tensor:
    """(parts, 3) float64 that add up to number, sum and sum of squares of the norms of rows.

    NaN if one of these is not finite.

    Args:
        feats: (N, D).
        labels: (N,); rows with -1 take no part.
        low, high: norms count as these at least and at most.
    """
    norms = torch.linalg.vector_norm(feats.detach(), dim=1, dtype=torch.float64)
    # 0 times infinity is not a number.
    clipped = torch.add(norms.clamp(low, high), norms, alpha=0.0)
    takes_part = labels != -1
    clipped = torch.where(takes_part, clipped, 0.0)
    return torch.stack([takes_part, clipped, clipped.square()]).sum(dim=1)[None]


@torch.no_grad()
def moved_statistics(sums: Tensor, mean: Tensor, std: Tensor, share: float) -> Tensor:
    """(2,): mean and standard deviation, moved by ``share`` towards those of a batch.

    What is not a number changes nothing, such as the deviation of one row.

    Args:
        sums: of :func:`norm_sums`.
        mean, std: () of the same dtype.
        share: in (0, 1].
    """
    count, total, squares = sums.sum(dim=0).unbind() if len(sums) > 1 else sums[0].unbind()
    mean_of_batch = total / count
    # Unbiased. Of one row not a number: 0 / 0.
    variance = torch.addcmul(squares, total, mean_of_batch, value=-1.0).clamp_min(0.0)
    variance = variance * (count > 1.0) / (count - 1.0)
    found = torch.stack([mean_of_batch, variance.sqrt()])
    kept = torch.stack([mean, std])
    moved = torch.lerp(kept.double(), found, share).to(kept.dtype)
    return torch.where(moved.isnan(), kept, moved)
