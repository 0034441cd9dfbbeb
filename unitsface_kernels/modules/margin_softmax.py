"""Margin softmax and its presets."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..losses import REGISTRY
from .class_loss import ClassLoss, Comparison


class MarginSoftmaxLoss(ClassLoss):
    """Class weights and margin softmax; see :func:`fused_margin_softmax_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, m1, m2, m3, margin_gradient, reduction, backend, skip_tolerance, adaptive_margin: as
            the function's.
        init_std: standard deviation of the initial weights; None: 0.01, as in insightface.
            UniTSFace, UniFace and EPL publish D ** -0.5, OpenSphere (2 / (C + D)) ** 0.5.

    Attributes:
        weight: (C, D) parameter.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.
    """

    #: Name in the registry of losses.
    loss = "margin_softmax"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.0,
        m3: float = 0.4,
        margin_gradient: str = "exact",
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        adaptive_margin: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__(
            *(embedding_size, num_classes, reduction, backend, 0.01, init_std, skip_tolerance)
        )
        self.scale = scale
        self.m1, self.m2, self.m3 = m1, m2, m3
        self.margin_gradient = margin_gradient
        self.adaptive_margin = adaptive_margin
        self.reset_parameters()

    def values(self) -> dict[str, float | str]:
        return {
            "scale": self.scale,
            "m1": self.m1,
            "m2": self.m2,
            "m3": self.m3,
            "margin_gradient": self.margin_gradient,
            "adaptive_margin": self.adaptive_margin,
        }

    def comparisons(self) -> list[Comparison]:
        return [Comparison(REGISTRY[self.loss], self.values(), self.weight, None)]

    def forward(self, feats: Tensor, labels: Tensor, class_index: Tensor | None = None) -> Tensor:
        return functional.fused_margin_softmax_loss(
            feats,
            self.weight,
            labels,
            **self.values(),  # type: ignore[arg-type]
            class_index=class_index,
            reduction=self.reduction,
            backend=self.backend,
            skip_tolerance=self.skip_tolerance,
        )

    def extra_repr(self) -> str:
        classes, size = self.weight.shape
        return (
            f"embedding_size={size}, num_classes={classes}, scale={self.scale}, m1={self.m1}, "
            f"m2={self.m2}, m3={self.m3}, margin_gradient={self.margin_gradient!r}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )


class NormFaceLoss(MarginSoftmaxLoss):
    """Cosine softmax without margin (Wang et al., "NormFace", ACM MM 2017, eq. 7)."""

    def __init__(self, embedding_size: int, num_classes: int, scale: float = 64.0, **kwargs):
        super().__init__(embedding_size, num_classes, scale, 1.0, 0.0, 0.0, **kwargs)


class CosFaceLoss(MarginSoftmaxLoss):
    """Additive cosine margin (Wang et al., "CosFace", CVPR 2018, eq. 4)."""

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float = 64.0,
        margin: float = 0.4,
        **kwargs,
    ):
        super().__init__(embedding_size, num_classes, scale, 1.0, 0.0, margin, **kwargs)


class ArcFaceLoss(MarginSoftmaxLoss):
    """Additive angular margin in radians (Deng et al., "ArcFace", CVPR 2019, eq. 3)."""

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float = 64.0,
        margin: float = 0.5,
        **kwargs,
    ):
        super().__init__(embedding_size, num_classes, scale, 1.0, margin, 0.0, **kwargs)


class SphereFaceLoss(MarginSoftmaxLoss):
    """Multiplicative angular margin (Liu et al., "SphereFace Revived", TPAMI 2022: R, hard)."""

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float = 30.0,
        margin: float = 1.7,
        **kwargs,
    ):
        super().__init__(embedding_size, num_classes, scale, margin, 0.0, 0.0, **kwargs)
