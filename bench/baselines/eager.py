"""Eager formulations of the same losses, written by us from the papers' formulas.

``*_eager``: the fastest known eager formulation: one elementwise function per pair, no one-hot
matrix. ``*_published``: as released training code does it: one-hot labels and both logarithmic
terms on the whole matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uss_eager(
    feats: Tensor,
    labels: Tensor,
    b: Tensor,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    *,
    scale: float,
    margin: float,
) -> Tensor:
    """USS: softplus of a signed logit; in-batch with the diagonal masked. () mean over rows."""
    unit = F.normalize(feats, dim=1)
    columns = unit if memory is None else F.normalize(memory, dim=1)
    column_labels = labels if memory_labels is None else memory_labels
    cosine = unit @ columns.T
    positive = labels[:, None] == column_labels[None, :]
    logits = torch.where(positive, b - scale * (cosine - margin), scale * cosine - b)
    if memory is None:
        logits = logits.fill_diagonal_(-torch.inf)
    return F.softplus(logits).sum() / feats.shape[0]


def uss_published(
    feats: Tensor,
    labels: Tensor,
    b: Tensor,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    *,
    scale: float,
    margin: float,
) -> Tensor:
    """USS with a one-hot mask and both terms on every pair. () mean over rows."""
    unit = F.normalize(feats, dim=1)
    columns = unit if memory is None else F.normalize(memory, dim=1)
    column_labels = labels if memory_labels is None else memory_labels
    cosine = (unit @ columns.T).float()
    positive = (labels[:, None] == column_labels[None, :]).to(cosine.dtype)
    positive_loss = torch.log(1.0 + torch.exp(-(scale * (cosine - margin) - b).clamp(-88, 88)))
    negative_loss = torch.log(1.0 + torch.exp((scale * cosine - b).clamp(-88, 88)))
    loss = positive_loss * positive + negative_loss * (1.0 - positive)
    if memory is None:
        loss = loss * (1.0 - torch.eye(feats.shape[0], device=feats.device))
    return loss.sum(dim=1).mean()


def cosface_eager(
    feats: Tensor, weight: Tensor, labels: Tensor, *, scale: float, margin: float
) -> Tensor:
    """CosFace: the margin taken off the targets in place, then cross-entropy. () mean."""
    cosine = F.normalize(feats, dim=1) @ F.normalize(weight, dim=1).T
    rows = torch.arange(feats.shape[0], device=feats.device)
    shift = torch.full_like(rows, -margin, dtype=cosine.dtype)
    logits = cosine.index_put_((rows, labels), shift, accumulate=True).mul_(scale)
    return F.cross_entropy(logits, labels)


def cosface_published(
    feats: Tensor, weight: Tensor, labels: Tensor, *, scale: float, margin: float
) -> Tensor:
    """CosFace with a one-hot matrix, as released heads subtract the margin. () mean."""
    cosine = F.linear(F.normalize(feats, dim=1), F.normalize(weight, dim=1))
    one_hot = torch.zeros_like(cosine).scatter_(1, labels[:, None], 1.0)
    logits = scale * (cosine - margin * one_hot)
    return F.cross_entropy(logits, labels)


def uce_eager(
    feats: Tensor, weight: Tensor, labels: Tensor, b: Tensor, *, scale: float, margin: float
) -> Tensor:
    """UCE: the targets' logits replaced in place, then one softplus. () mean."""
    cosine = F.normalize(feats, dim=1) @ F.normalize(weight, dim=1).T
    rows = torch.arange(feats.shape[0], device=feats.device)
    targets = b - scale * (cosine[rows, labels] - margin)
    logits = (scale * cosine - b).index_put_((rows, labels), targets.to(cosine.dtype))
    return F.softplus(logits).sum() / feats.shape[0]


def uce_published(
    feats: Tensor, weight: Tensor, labels: Tensor, b: Tensor, *, scale: float, margin: float
) -> Tensor:
    """UCE with a one-hot matrix and both terms for every class. () mean."""
    cosine = F.linear(F.normalize(feats, dim=1), F.normalize(weight, dim=1)).float()
    one_hot = torch.zeros_like(cosine).scatter_(1, labels[:, None], 1.0)
    target_loss = torch.log(1.0 + torch.exp(-(scale * (cosine - margin) - b).clamp(-88, 88)))
    other_loss = torch.log(1.0 + torch.exp((scale * cosine - b).clamp(-88, 88)))
    return (target_loss * one_hot + other_loss * (1.0 - one_hot)).sum(dim=1).mean()


def clip_eager(feats: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP: one matrix of logits, and a cross-entropy of it and of its transpose. () mean."""
    logits = scale * (F.normalize(feats, dim=1) @ F.normalize(texts, dim=1).T)
    truth = torch.arange(len(feats), device=feats.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def clip_published(feats: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP with a matrix of logits for each direction, as open_clip on one device. () mean."""
    a, b = F.normalize(feats, dim=1), F.normalize(texts, dim=1)
    truth = torch.arange(len(feats), device=feats.device)
    forth, back = scale * a @ b.T, scale * b @ a.T
    return (F.cross_entropy(forth, truth) + F.cross_entropy(back, truth)) / 2


def siglip_eager(feats: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP: softplus of the logits, of matching pairs with the other sign. () over rows."""
    logits = scale * (F.normalize(feats, dim=1) @ F.normalize(texts, dim=1).T) + bias
    # softplus(-z) is softplus(z) - z.
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(feats)


def siglip_published(feats: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP with a matrix of signs, as open_clip on one device. () over rows."""
    logits = scale * F.normalize(feats, dim=1) @ F.normalize(texts, dim=1).T + bias
    signs = 2 * torch.eye(len(feats), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(feats)
