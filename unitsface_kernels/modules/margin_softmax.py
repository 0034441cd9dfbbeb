"""Margin softmax and its presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..losses.filtered_margin_softmax import SPEC, chosen
from .class_loss import Comparison, RegisteredClassLoss

_DEFAULT = SPEC.default


class MarginSoftmaxLoss(RegisteredClassLoss):
    """Class weights and margin softmax; see :func:`fused_margin_softmax_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, m1, m2, m3, margin_gradient, reduction, backend, skip_tolerance, adaptive_margin,
            interclass_filtering_threshold, centers: as the function's.
        init_std: standard deviation of the initial weights; None: 0.01, as in insightface.
            UniTSFace, UniFace and EPL publish D ** -0.5, OpenSphere (2 / (C + D)) ** 0.5.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes or init_std; from a call, as the function.
    """

    loss = "margin_softmax"
    spec = SPEC
    scale: float | Tensor
    interclass_filtering_threshold: float | Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _DEFAULT.scale,
        m1: float | Tensor = _DEFAULT.m1,
        m2: float | Tensor = _DEFAULT.m2,
        m3: float | Tensor = _DEFAULT.m3,
        margin_gradient: str = _DEFAULT.margin_gradient,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        adaptive_margin: float | Tensor = _DEFAULT.adaptive_margin,
        init_std: float | None = None,
        interclass_filtering_threshold: float | Tensor = _DEFAULT.interclass_filtering_threshold,
        centers: int = 1,
    ) -> None:
        super().__init__(locals())

    def comparisons(self) -> list[Comparison]:
        (block,) = super().comparisons()
        spec, values = chosen(block.values)
        return [replace(block, spec=spec, values=values)]

    def _shown(self) -> dict[str, Any]:
        shown, limit = super()._shown(), self.interclass_filtering_threshold
        if not isinstance(limit, Tensor) and limit == 0:
            del shown["interclass_filtering_threshold"]
        return shown


def _preset(
    module: MarginSoftmaxLoss, given: dict[str, Any], **margins: float | Tensor
) -> dict[str, Any]:
    """Keywords of the base class: the margins of a preset, and the others that were given."""
    for name in margins.keys() & given.keys():
        own = "its margin is margin=" if isinstance(module, _OneMargin) else "it has no margin"
        raise TypeError(
            f"{type(module).__name__} does not take {name} ({own}; MarginSoftmaxLoss takes m1, m2 "
            f"and m3), got {name}={given[name]!r}"
        )
    return {**margins, **given}


class NormFaceLoss(MarginSoftmaxLoss):
    """Cosine softmax without margin (Wang et al., "NormFace", ACM MM 2017, eq. 7)."""

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _DEFAULT.scale,
        **kwargs: Any,
    ) -> None:
        margins = _preset(self, kwargs, m1=1.0, m2=0.0, m3=0.0)
        super().__init__(embedding_size, num_classes, scale, **margins)


class _OneMargin(MarginSoftmaxLoss):
    """A preset with one margin, an attribute under its constructor's name and the function's."""

    _margin: str

    @property
    def margin(self) -> float | Tensor:
        value: float | Tensor = getattr(self, self._margin)
        return value

    @margin.setter
    def margin(self, value: float | Tensor) -> None:
        setattr(self, self._margin, value)


class CosFaceLoss(_OneMargin):
    """Additive cosine margin (Wang et al., "CosFace", CVPR 2018, eq. 4)."""

    _margin = "m3"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _DEFAULT.scale,
        margin: float | Tensor = 0.4,
        **kwargs: Any,
    ) -> None:
        margins = _preset(self, kwargs, m1=1.0, m2=0.0, m3=margin)
        super().__init__(embedding_size, num_classes, scale, **margins)


class ArcFaceLoss(_OneMargin):
    """Additive angular margin in radians (Deng et al., "ArcFace", CVPR 2019, eq. 3)."""

    _margin = "m2"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _DEFAULT.scale,
        margin: float | Tensor = 0.5,
        **kwargs: Any,
    ) -> None:
        margins = _preset(self, kwargs, m1=1.0, m2=margin, m3=0.0)
        super().__init__(embedding_size, num_classes, scale, **margins)


class SubCenterArcFaceLoss(_OneMargin):
    """ArcFace with K = ``centers`` vectors per class (Deng et al., "Sub-center ArcFace: Boosting
    Face Recognition by Large-Scale Noisy Web Faces", ECCV 2020, section 3).

    The cosine with a class is that with its nearest center, so that noisy samples may gather at
    another one than the clean ones. ``subcenters.keep_dominant`` drops the others in the end.
    """

    _margin = "m2"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float = _DEFAULT.scale,
        margin: float = 0.5,
        centers: int = 3,
        **kwargs: Any,
    ) -> None:
        margins = _preset(self, kwargs, m1=1.0, m2=margin, m3=0.0)
        super().__init__(embedding_size, num_classes, scale, centers=centers, **margins)


class SphereFaceLoss(_OneMargin):
    """Multiplicative angular margin (Liu et al., "SphereFace Revived", TPAMI 2022: R, hard)."""

    _margin = "m1"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = 30.0,
        margin: float | Tensor = 1.7,
        **kwargs: Any,
    ) -> None:
        margins = _preset(self, kwargs, m1=margin, m2=0.0, m3=0.0)
        super().__init__(embedding_size, num_classes, scale, **margins)
