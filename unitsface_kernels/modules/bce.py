"""Class losses of binary cross-entropies: class weights and thresholds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import functional, validate
from ..losses import REGISTRY
from .class_loss import ClassLoss, Comparison


class UCELoss(ClassLoss):
    """Class weights and unified cross-entropy with one threshold; see :func:`fused_uce_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, margin, negative_weight, reduction, backend, skip_tolerance, adaptive_margin: as the
            function's.
        init_std: standard deviation of the initial weights; None: D ** -0.5 as published (UniFace).

    Attributes:
        weight: (C, D) parameter.
        threshold: () parameter b, initialized log(10 C) as published, in :class:`PartialFC`
            log(10 r C) with its ``sample_rate`` r; the unified cosine threshold is
            ``threshold / scale``.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.
    """

    #: Name in the registry of losses.
    loss = "uce"
    _threshold_per_class = False

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float = 64.0,
        margin: float = 0.4,
        negative_weight: float = 1.0,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        adaptive_margin: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        validate.positive_int("embedding_size", embedding_size)
        std = embedding_size**-0.5
        super().__init__(
            *(embedding_size, num_classes, reduction, backend, std, init_std, skip_tolerance)
        )
        self.scale = scale
        self.margin = margin
        self.negative_weight = negative_weight
        self.adaptive_margin = adaptive_margin
        thresholds = (num_classes,) if self._threshold_per_class else ()
        self.threshold = nn.Parameter(torch.empty(thresholds))
        self.reset_parameters()

    def reset_thresholds(self) -> None:
        nn.init.constant_(self.threshold, math.log(10 * self.sample_rate * self.num_classes))

    def values(self) -> dict[str, float | str]:
        return {
            "scale": self.scale,
            "margin": self.margin,
            "negative_weight": self.negative_weight,
            "adaptive_margin": self.adaptive_margin,
        }

    def comparisons(self) -> list[Comparison]:
        spec = REGISTRY[self.loss]
        return [Comparison(spec, self.values(), self.weight, self.threshold)]

    def forward(self, feats: Tensor, labels: Tensor, class_index: Tensor | None = None) -> Tensor:
        return functional.fused_uce_loss(
            feats,
            self.weight,
            labels,
            self.threshold,
            **self.values(),  # type: ignore[arg-type]
            class_index=class_index,
            reduction=self.reduction,
            backend=self.backend,
            skip_tolerance=self.skip_tolerance,
        )

    def extra_repr(self) -> str:
        classes, size = self.weight.shape
        return (
            f"embedding_size={size}, num_classes={classes}, scale={self.scale}, "
            f"margin={self.margin}, negative_weight={self.negative_weight}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )


class ClassBCELoss(UCELoss):
    """Class weights and binary cross-entropy with a threshold per class (BCE-d).

    Arguments, shapes and initial values are those of :class:`UCELoss`.

    Attributes:
        weight: (C, D) parameter.
        threshold: (C,) parameter b.
    """

    loss = "class_bce"
    _threshold_per_class = True
