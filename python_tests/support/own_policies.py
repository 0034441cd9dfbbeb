"""Users' policies, written as a user would, with the same formulas written in Torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unitsface_kernels import policy


class Contrastive(policy.Pair):
    margin: policy.Number = 0.4

    def positive(self, c):
        return 1 - c

    def negative(self, c):
        return policy.maximum(c - self.margin, 0)


class Threshold(policy.Pair):
    """USS by another name."""

    combine = "softplus"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.1
    b: policy.Threshold

    def positive(self, c):
        return self.scale * (c - self.margin) - self.b

    def negative(self, c):
        return self.scale * c - self.b


class Tuplet(policy.Pair):
    """Pair softmax by another name."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.1

    def positive(self, c):
        return self.scale * (c - self.margin)

    def negative(self, c):
        return self.scale * c


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
