"""Users' policies, written as a user would, with the same formulas written in Torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train.examples.policies import Contrastive
from unitsface_kernels import policy
from unitsface_kernels.losses.pair_softmax import PairSoftmax
from unitsface_kernels.losses.uss import USS

__all__ = ["Contrastive", "Cosine", "Threshold", "Tuplet", "Unified", "contrastive"]


class Threshold(USS):
    """USS by another name."""


class Tuplet(PairSoftmax):
    """Pair softmax by another name."""


class Cosine(policy.Class):
    """CosFace by another name."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.4

    def positive(self, c):
        return self.scale * (c - self.margin)

    def negative(self, c):
        return self.scale * c


class Unified(policy.Class):
    """UCE by another name, with weights of its own."""

    combine = "softplus"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.4
    share: policy.Number = 1.0
    b: policy.Threshold

    def positive(self, c):
        return self.scale * (c - self.margin) - self.b

    def negative(self, c):
        return self.scale * c - self.b

    def negative_weight(self):
        return self.share


def contrastive(cosine: Tensor, same: Tensor, other: Tensor, margin: float) -> Tensor:
    """(N, M) cosines, masks of positives and negatives, to (N,) losses of :class:`Contrastive`."""
    return torch.where(same, 1 - cosine, F.relu(cosine - margin) * other).sum(dim=1)
