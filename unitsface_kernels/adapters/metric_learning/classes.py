"""CosFace, ArcFace with one or several centers, SphereFace, L-Softmax and Normalized Softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import functional, subcenters, validate
from ...losses.norm_softmax import NormSoftmax
from .base import labels_of
from .weighted import ClassLoss, Fill


class _MarginLoss(ClassLoss):
    """Softmax of cosines with a margin; see :class:`ClassLoss`.

    Args:
        margin, scale: of the loss.

    Attributes:
        W: (D, C) parameter.
    """

    allowed = "cosine"
    W: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float,
        scale: float,
        weight_init_func: Fill | None,
        backend: str,
        options: dict[str, Any],
    ) -> None:
        super().__init__(num_classes, embedding_size, weight_init_func, backend, options)
        self.margin = margin
        self.scale = scale

    def get_cosine(self, embeddings: Tensor) -> Tensor:
        """(N, C) cosines, in the embeddings' dtype."""
        validate.features("embeddings", embeddings)
        weight = self.W.to(embeddings.dtype)
        return F.normalize(embeddings) @ F.normalize(weight, dim=0)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, C) scaled cosines without margin, in the embeddings' dtype."""
        return self.get_cosine(embeddings) * self.scale

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, "
            f"margin={self.margin}, scale={self.scale}, backend={self.backend!r}"
        )


class CosFaceLoss(_MarginLoss):
    """Additive cosine margin; see :class:`ClassLoss`."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64,
        *,
        weight_init_func: Fill | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes, embedding_size, margin, scale, weight_init_func, backend, options
        )

    def losses(self, embeddings: Tensor, weights: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return functional.fused_margin_softmax_loss(
            embeddings,
            weights,
            labels,
            scale=self.scale,
            m2=0.0,
            m3=self.margin,
            reduction=reduction,
            backend=self.backend,
        )


class ArcFaceLoss(_MarginLoss):
    """Additive angular margin; see :class:`ClassLoss`.

    The margin is given in degrees, from 0 to 180; the attribute, as in the original, has it in
    radians. Targets with an angle past pi - margin get the logit
    s (cos theta - margin sin margin), as there.
    """

    #: Weight vectors of a class.
    sub_centers: int = 1

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        *,
        weight_init_func: Fill | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        validate.number("margin", margin, at_least=0.0, at_most=180.0)
        margin = math.radians(margin)
        super().__init__(
            num_classes, embedding_size, margin, scale, weight_init_func, backend, options
        )

    def losses(self, embeddings: Tensor, weights: Tensor, labels: Tensor, reduction: str) -> Tensor:
        # A margin that does not grow with the norm.
        return functional.fused_magface_loss(
            embeddings,
            weights,
            labels,
            scale=self.scale,
            l_margin=self.margin,
            u_margin=self.margin,
            lambda_g=0.0,
            margin_type="hard",
            reduction=reduction,
            backend=self.backend,
            centers=self.sub_centers,
        )


class SubCenterArcFaceLoss(ArcFaceLoss):
    """ArcFace with several centers per class, of which the nearest counts (ECCV 2020).

    As :class:`ArcFaceLoss`, with W (D, C * sub_centers), centers of a class side by side.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        sub_centers: int = 3,
        **options: Any,
    ) -> None:
        validate.centers(sub_centers)
        # Before the module is one: the weights are made in its constructor.
        self.__dict__["sub_centers"] = sub_centers
        super().__init__(num_classes, embedding_size, margin, scale, **options)

    @property
    def columns(self) -> int:
        return self.num_classes * self.sub_centers

    def get_cosine(self, embeddings: Tensor) -> Tensor:
        """(N, C) cosines with the nearest centers, in the embeddings' dtype."""
        cosines = super().get_cosine(embeddings)
        return cosines.unflatten(1, (self.num_classes, self.sub_centers)).amax(dim=2)

    @torch.no_grad()
    def get_outliers(
        self,
        embeddings: Tensor,
        labels: Tensor,
        threshold: float = 75,
        return_dominant_centers: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Samples farther than ``threshold`` degrees from their class's dominant center.

        Returns:
            Their indices, in the order of classes, and the (D, C) centers, which the original
            returns in any case; a class without samples has its first one.
        """
        validate.features("embeddings", embeddings)
        labels = labels_of("labels", labels, embeddings, "embeddings")
        weights = self.W.t().to(embeddings.dtype).unflatten(0, (-1, self.sub_centers))
        kept = subcenters.keep_dominant(weights, embeddings, labels, angle=float(threshold))
        found = torch.where(~kept.kept)[0]
        order = labels[found].sort(stable=True).indices
        return found[order], kept.weight.t()


class _NormLoss(_MarginLoss):
    """Softmax whose logits have the norm of the embeddings, with a whole multiple of the angle."""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 4,
        scale: float = 1,
        *,
        weight_init_func: Fill | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        validate.number("margin", margin, at_least=1.0)
        super().__init__(
            num_classes,
            embedding_size,
            int(margin),
            scale,
            weight_init_func,
            backend,
            options,
        )

    def losses(self, embeddings: Tensor, weights: Tensor, labels: Tensor, reduction: str) -> Tensor:
        return _of_norms(self, embeddings, weights, labels, reduction)

    def sizes(self, weights: Tensor) -> Tensor:
        """(C,) or (1,) what logits are multiplied by."""
        return torch.ones(1, device=weights.device)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, C) logits without margin, in the embeddings' dtype."""
        norms = torch.linalg.vector_norm(embeddings, dim=1)[:, None]
        sizes = self.sizes(self.rows().to(embeddings.dtype)).to(embeddings.dtype)
        return self.get_cosine(embeddings) * norms * sizes * self.scale


class SphereFaceLoss(_NormLoss):
    """Multiplicative angular margin (Liu et al., CVPR 2017); see :class:`ClassLoss`."""


class LargeMarginSoftmaxLoss(_NormLoss):
    """As :class:`SphereFaceLoss`, with the norms of the weights in the logits (Liu et al., ICML
    2016).
    """

    def sizes(self, weights: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weights, dim=1)


def _of_norms(
    loss: _NormLoss | NormalizedSoftmaxLoss,
    embeddings: Tensor,
    weights: Tensor,
    labels: Tensor,
    reduction: str,
) -> Tensor:
    """With the norm of the embeddings in the logits."""
    return functional.fused_class_loss(
        NormSoftmax(scale=float(loss.scale), m1=float(loss.margin)),
        embeddings,
        weights,
        labels,
        size=loss.sizes(weights),
        reduction=reduction,
        backend=loss.backend,
    )


class NormalizedSoftmaxLoss(ClassLoss):
    """Softmax of inner products with unit weights, of unit embeddings or of those as they are
    (``DotProductSimilarity(normalize_embeddings=False)``), divided by ``temperature`` > 0; see
    :class:`ClassLoss`.

    Attributes:
        W: (D, C) parameter.
    """

    allowed = "similarity"
    W: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        temperature: float = 0.05,
        *,
        weight_init_func: Fill | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, weight_init_func, backend, options)
        validate.number("temperature", temperature, above=0.0)
        self.temperature = temperature
        #: Of :class:`NormSoftmax`.
        self.margin = 1

    @property
    def scale(self) -> float:
        return 1.0 / self.temperature

    def losses(self, embeddings: Tensor, weights: Tensor, labels: Tensor, reduction: str) -> Tensor:
        if not self.measure.normalize:
            return _of_norms(self, embeddings, weights, labels, reduction)
        return functional.fused_margin_softmax_loss(
            embeddings,
            weights,
            labels,
            scale=self.scale,
            m2=0.0,
            m3=0.0,
            reduction=reduction,
            backend=self.backend,
        )

    def sizes(self, weights: Tensor) -> Tensor:
        return torch.ones(1, device=weights.device)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(N, C) logits, in the embeddings' dtype."""
        validate.features("embeddings", embeddings)
        weight = F.normalize(self.W.to(embeddings.dtype), dim=0)
        rows = F.normalize(embeddings) if self.measure.normalize else embeddings
        return rows @ weight / self.temperature

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, embedding_size={self.embedding_size}, "
            f"temperature={self.temperature}, backend={self.backend!r}"
        )
