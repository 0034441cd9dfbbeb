"""pytorch-metric-learning's losses that are nearest to ours; imported when first called.

Classes: its CosFace is the same loss. Pairs: of its losses the multi-similarity loss is the one
with a unified threshold (its ``base``); it takes the log-sum-exp of a row's positives and of its
negatives where USS adds up softplus, so the work is the same and the value is not.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def _multi_similarity(scale: float, base: float):
    from pytorch_metric_learning.losses import MultiSimilarityLoss

    return MultiSimilarityLoss(alpha=scale, beta=scale, base=base)


def multi_similarity(
    feats: Tensor,
    labels: Tensor,
    b: Tensor,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """Multi-similarity loss with the threshold ``b / scale``, which gets no gradient. () mean."""
    loss = _multi_similarity(scale, float(b.detach()) / scale)
    return loss(feats, labels, ref_emb=memory, ref_labels=memory_labels)


def multi_similarity_formula(
    feats: Tensor,
    labels: Tensor,
    b: Tensor,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """Its formula, for the check in float64: softplus of the two log-sum-exps of a row."""
    unit = F.normalize(feats, dim=1)
    columns = unit if memory is None else F.normalize(memory, dim=1)
    column_labels = labels if memory_labels is None else memory_labels
    logits = scale * (unit @ columns.T) - b.detach()
    positive = labels[:, None] == column_labels[None, :]
    negative = ~positive
    if memory is None:
        positive = positive & ~torch.eye(len(feats), dtype=torch.bool, device=feats.device)
    rows = torch.zeros((), dtype=logits.dtype, device=logits.device)
    for sign, mask in ((-1.0, positive), (1.0, negative)):
        # A finite fill: rows without a pair give softplus of it, which is 0.
        exponents = (sign * logits).masked_fill(~mask, -1e4)
        rows = rows + F.softplus(exponents.logsumexp(dim=1)) / scale
    return rows.mean()


@cache
def _cosface(classes: int, size: int, scale: float, margin: float):
    from pytorch_metric_learning.losses import CosFaceLoss

    loss = CosFaceLoss(classes, size, margin=margin, scale=scale)
    del loss.W  # takes the weights of a call instead of its own
    return loss


def cosface(feats: Tensor, weight: Tensor, labels: Tensor, *, scale: float, margin: float):
    """Its CosFace on our weights, which it keeps as (D, C). () mean."""
    loss = _cosface(*weight.shape, scale, margin)
    loss.W = weight.t()
    return loss(feats, labels)
