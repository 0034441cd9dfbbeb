"""Features with known scores, and the scores of all pairs for brute force."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import DEVICES
from torch import Tensor

from unitsface_kernels import dispatch
from unitsface_kernels.metrics.tiles import Scores

TARGETS = [
    (backend, device)
    for device in DEVICES
    for backend in ("native", "reference")
    if dispatch.unavailable(backend, device, torch.float32) is None
]
each_target = pytest.mark.parametrize(("backend", "device"), TARGETS)


def signs(n: int, size: int = 16) -> Tensor:
    """Features whose norms and cosines are exact in float32, in whatever order they are added."""
    return torch.randint(0, 2, (n, size)).float() * 2 - 1


def identities(n: int, count: int) -> Tensor:
    return torch.randint(-1, count, (n,))


def clusters(n: int, count: int, size: int = 24, noise: float = 0.6) -> tuple[Tensor, Tensor]:
    labels = identities(n, count)
    return torch.randn(count, size)[labels] + noise * torch.randn(n, size), labels


def kinds(
    cosine: Tensor, labels: Tensor, other_labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sorted scores of the positive and of the negative pairs of a full matrix."""
    columns = labels if other_labels is None else other_labels
    counted = (labels >= 0)[:, None] & (columns >= 0)[None, :]
    if other_labels is None:
        counted &= torch.ones_like(counted).triu(1)
    same = labels[:, None] == columns[None, :]
    return cosine[counted & same].sort().values, cosine[counted & ~same].sort().values


def full_matrix(
    feats: Tensor, other: Tensor | None = None, *, backend: str = "auto", upper: bool = False
) -> Tensor:
    """The scores as the backend computes them; ``upper``: those of unordered pairs."""
    columns = feats if other is None else other
    labels = [torch.zeros(len(t), dtype=torch.int64, device=t.device) for t in (feats, columns)]
    scores = Scores(feats, labels[0], other, None if other is None else labels[1], backend)
    full = torch.full((len(feats), len(columns)), math.nan)
    for tile in scores.tiles(upper=upper):
        full[tile.start : tile.stop, tile.other : tile.end] = tile.cosines.cpu()
    return full


def count_at(sorted_scores: Tensor, thresholds: Tensor) -> Tensor:
    """Number of scores that are at least each threshold."""
    return len(sorted_scores) - torch.searchsorted(sorted_scores, thresholds, right=False)
