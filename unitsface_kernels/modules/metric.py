"""Losses of metric learning over pairs of samples."""

from __future__ import annotations

from ..distributed.collectives import Group
from ..losses import batch_hard, contrastive
from .pair import RegisteredPairLoss

_CONTRASTIVE, _HARD = contrastive.SPEC.default, batch_hard.SPEC.default


class ContrastiveLoss(RegisteredPairLoss):
    """Contrastive over pairs of samples; see :func:`fused_contrastive_loss`. It has no parameters.

    Args:
        positive_margin, negative_margin, distance, reduction, backend, skip_tolerance, group,
            exchange: as the function's.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) and the int
        batch_offset -> () float32.
    """

    loss = "contrastive"

    def __init__(
        self,
        positive_margin: float = _CONTRASTIVE.positive_margin,
        negative_margin: float = _CONTRASTIVE.negative_margin,
        distance: str = _CONTRASTIVE.distance,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(locals())


class TripletLoss(RegisteredPairLoss):
    """Batch-hard triplets; see :func:`fused_triplet_loss`. It has no parameters.

    Args:
        margin, k, distance, hinge, reduction, backend, group, exchange: as the function's.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) and the int
        batch_offset -> () float32.
    """

    loss = "batch_hard"

    def __init__(
        self,
        margin: float = _HARD.margin,
        k: int = _HARD.k,
        distance: str = _HARD.distance,
        hinge: str = _HARD.hinge,
        reduction: str = "mean",
        backend: str = "auto",
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(locals())
