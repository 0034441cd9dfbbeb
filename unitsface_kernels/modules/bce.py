"""Class losses of binary cross-entropies: class weights and thresholds."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..losses.uce import SPEC
from .class_loss import RegisteredClassLoss

_DEFAULT = SPEC.default


class UCELoss(RegisteredClassLoss):
    """Class weights and unified cross-entropy with one threshold; see :func:`fused_uce_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, margin, negative_weight, reduction, backend, skip_tolerance, adaptive_margin,
            centers: as the function's.
        init_std: standard deviation of the initial weights; None: D ** -0.5 as published (UniFace).

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).
        threshold: () parameter b, initialized log(10 C) as published, in :class:`PartialFC`
            log(10 r C) with its ``sample_rate`` r; the unified cosine threshold is
            ``threshold / scale``.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes or init_std; from a call, as the function.
    """

    loss = "uce"
    scale: float | Tensor
    threshold: nn.Parameter

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _DEFAULT.scale,
        margin: float | Tensor = _DEFAULT.margin,
        negative_weight: float | Tensor = _DEFAULT.negative_weight,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        adaptive_margin: float | Tensor = _DEFAULT.adaptive_margin,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        super().__init__(locals())

    def _default_std(self, embedding_size: int) -> float:
        return embedding_size**-0.5

    def reset_thresholds(self) -> None:
        nn.init.constant_(self.threshold, math.log(10 * self.sample_rate * self.num_classes))


class ClassBCELoss(UCELoss):
    """Class weights and binary cross-entropy with a threshold per class (BCE-d).

    Arguments, shapes and initial values are those of :class:`UCELoss`.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).
        threshold: (C,) parameter b.
    """

    loss = "class_bce"
