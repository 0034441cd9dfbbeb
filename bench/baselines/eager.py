"""Eager formulations of the same losses, written by us from the papers' formulas.

``*_eager``: the best eager formulation we know: one elementwise function per pair, no one-hot
matrix. ``*_published``: as released training code does it: one-hot labels and both logarithmic
terms on the whole matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uss_eager(feats: Tensor, labels: Tensor, b: Tensor, scale: float, margin: float) -> Tensor:
    """In-batch USS: softplus of a signed logit, diagonal masked. () mean over rows."""
    unit = F.normalize(feats, dim=1)
    cosine = unit @ unit.T
    positive = labels[:, None] == labels[None, :]
    logits = torch.where(positive, b - scale * (cosine - margin), scale * cosine - b)
    logits = logits.fill_diagonal_(-torch.inf)
    return F.softplus(logits).sum() / feats.shape[0]


def uss_published(feats: Tensor, labels: Tensor, b: Tensor, scale: float, margin: float) -> Tensor:
    """In-batch USS with a one-hot mask and both terms on every pair. () mean over rows."""
    unit = F.normalize(feats, dim=1)
    cosine = unit @ unit.T
    other = 1.0 - torch.eye(feats.shape[0], device=feats.device)
    positive = (labels[:, None] == labels[None, :]).to(cosine.dtype)
    positive_loss = torch.log(1.0 + torch.exp(-(scale * (cosine - margin) - b).clamp(-88, 88)))
    negative_loss = torch.log(1.0 + torch.exp((scale * cosine - b).clamp(-88, 88)))
    loss = positive_loss * positive * other + negative_loss * (1.0 - positive) * other
    return loss.sum(dim=1).mean()


def cosface_eager(
    feats: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float
) -> Tensor:
    """CosFace: the margin taken off the targets in place, then cross-entropy. () mean."""
    cosine = F.normalize(feats, dim=1) @ F.normalize(weight, dim=1).T
    rows = torch.arange(feats.shape[0], device=feats.device)
    shift = torch.full_like(rows, -margin, dtype=cosine.dtype)
    logits = cosine.index_put_((rows, labels), shift, accumulate=True).mul_(scale)
    return F.cross_entropy(logits, labels)


def cosface_published(
    feats: Tensor, weight: Tensor, labels: Tensor, scale: float, margin: float
) -> Tensor:
    """CosFace with a one-hot matrix, as released heads subtract the margin. () mean."""
    cosine = F.linear(F.normalize(feats, dim=1), F.normalize(weight, dim=1))
    one_hot = torch.zeros_like(cosine).scatter_(1, labels[:, None], 1.0)
    logits = scale * (cosine - margin * one_hot)
    return F.cross_entropy(logits, labels)
