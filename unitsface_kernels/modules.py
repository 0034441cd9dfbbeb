"""Modules that own a loss's parameters. Formulas and arguments: see ``functional``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional, validate


class MarginSoftmaxLoss(nn.Module):
    """Class weights and margin softmax; see :func:`fused_margin_softmax_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, m1, m2, m3, margin_gradient, reduction, backend: as the function's.

    Attributes:
        weight: (C, D) parameter, initialised N(0, 0.01) as in insightface.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1 -> () float32.
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
    ) -> None:
        super().__init__()
        validate.positive_int("embedding_size", embedding_size)
        validate.positive_int("num_classes", num_classes)
        self.scale = scale
        self.m1, self.m2, self.m3 = m1, m2, m3
        self.margin_gradient = margin_gradient
        self.reduction = reduction
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        return functional.fused_margin_softmax_loss(
            feats,
            self.weight,
            labels,
            scale=self.scale,
            m1=self.m1,
            m2=self.m2,
            m3=self.m3,
            margin_gradient=self.margin_gradient,
            reduction=self.reduction,
            backend=self.backend,
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


class USSLoss(nn.Module):
    """USS with its learnable threshold; see :func:`fused_uss_loss`.

    Args:
        scale, margin, reduction, backend: as the function's.
        init_threshold: first value of b, in logit units.

    Attributes:
        threshold: () parameter b; the unified cosine threshold is ``threshold / scale``.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) -> () float32.
    """

    #: Name in the registry of losses.
    loss = "uss"

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.1,
        init_threshold: float = 0.0,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.init_threshold = init_threshold
        self.reduction = reduction
        self.backend = backend
        self.threshold = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.threshold, self.init_threshold)

    def forward(
        self,
        feats: Tensor,
        labels: Tensor,
        memory: Tensor | None = None,
        memory_labels: Tensor | None = None,
    ) -> Tensor:
        return functional.fused_uss_loss(
            feats,
            labels,
            self.threshold,
            memory=memory,
            memory_labels=memory_labels,
            scale=self.scale,
            margin=self.margin,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale}, margin={self.margin}, init_threshold={self.init_threshold}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )


class PairSoftmaxLoss(nn.Module):
    """Softmax over pairs of samples; see :func:`fused_pair_softmax_loss`. It has no parameters.

    Args:
        scale, margin, reduction, backend: as the function's.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) -> () float32.
    """

    #: Name in the registry of losses.
    loss = "pair_softmax"

    def __init__(
        self,
        scale: float = 64.0,
        margin: float = 0.1,
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        feats: Tensor,
        labels: Tensor,
        memory: Tensor | None = None,
        memory_labels: Tensor | None = None,
    ) -> Tensor:
        return functional.fused_pair_softmax_loss(
            feats,
            labels,
            memory=memory,
            memory_labels=memory_labels,
            scale=self.scale,
            margin=self.margin,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale}, margin={self.margin}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )


class UniTSFaceLoss(nn.Module):
    """Sum of a sample-to-class and a sample-to-sample loss (UniTSFace, section 3.3).

    The paper's model is ``UniTSFaceLoss(CosFaceLoss(...), USSLoss(...))``.

    Args:
        class_loss: module called with (feats, labels).
        pair_loss: module called with (feats, labels) and the keywords given to ``forward``.
    """

    def __init__(self, class_loss: nn.Module, pair_loss: nn.Module) -> None:
        super().__init__()
        self.class_loss = class_loss
        self.pair_loss = pair_loss

    def forward(self, feats: Tensor, labels: Tensor, **pair_arguments: Tensor) -> Tensor:
        return self.class_loss(feats, labels) + self.pair_loss(feats, labels, **pair_arguments)


CLASS_LOSSES: dict[str, type[nn.Module]] = {
    "normface": NormFaceLoss,
    "cosface": CosFaceLoss,
    "arcface": ArcFaceLoss,
    "sphereface": SphereFaceLoss,
}
PAIR_LOSSES: dict[str, type[nn.Module]] = {
    "uss": USSLoss,
    "pair_softmax": PairSoftmaxLoss,
}
