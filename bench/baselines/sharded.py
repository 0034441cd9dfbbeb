"""A class head as large-scale training code runs it, on one rank: softmax by hand, in place.

Such heads keep one N x C matrix: cosines become logits, probabilities and at last gradients where
they are. Written by us; the division of the classes over ranks is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _CosFaceSoftmax(torch.autograd.Function):
    """Mean CosFace cross-entropy of cosines, which it overwrites."""

    @staticmethod
    def forward(
        ctx, cosine: Tensor, labels: Tensor, scale: float, margin: float
    ) -> tuple[Tensor, Tensor]:
        rows = torch.arange(cosine.shape[0], device=cosine.device)
        cosine[rows, labels] -= margin
        logits = cosine.mul_(scale)
        logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
        probabilities = logits.div_(logits.sum(dim=1, keepdim=True))
        ctx.mark_dirty(cosine)
        ctx.probabilities, ctx.labels, ctx.scale = probabilities, labels, scale
        return -probabilities[rows, labels].clamp_min(1e-30).log().mean(), probabilities

    @staticmethod
    def backward(ctx, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = ctx.probabilities
        rows = torch.arange(gradient.shape[0], device=gradient.device)
        gradient[rows, ctx.labels] -= 1.0
        return gradient.mul_(upstream * (ctx.scale / gradient.shape[0])), None, None, None


def cosface_sharded(
    feats: Tensor, weight: Tensor, labels: Tensor, *, scale: float, margin: float
) -> Tensor:
    """CosFace on clamped float32 cosines; one backward pass. () mean."""
    cosine = F.linear(F.normalize(feats, dim=1), F.normalize(weight, dim=1))
    return _CosFaceSoftmax.apply(cosine.float().clamp(-1.0, 1.0), labels, scale, margin)[0]
