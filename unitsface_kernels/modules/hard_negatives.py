"""Losses whose negatives depend on the target's cosine, with their class weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import validate
from ..distributed.collectives import sum_over_ranks
from ..functional.statistics import target_cosines
from ..losses import curricularface, mv_softmax
from .class_loss import RegisteredClassLoss, Total
from .moving import MovingLoss

_CURRICULARFACE, _MV_SOFTMAX = curricularface.SPEC.default, mv_softmax.SPEC.default


class CurricularFaceLoss(MovingLoss):
    r"""Class weights and CurricularFace; see :func:`fused_curricularface_loss`.

    Every training batch, in calls with gradients, first moves t towards the mean r of its target
    cosines, those of all ranks together, as published:

    .. math:: t \leftarrow \alpha\, r + (1 - \alpha)\, t

    The paper has :math:`\alpha = 0.99` there, its code 0.01; see docs/math.md. A batch that is not
    finite, that has no labels, or whose loss is an error moves nothing.

    Source: Huang et al., CVPR 2020, and head/metrics.py of HuangYG123/CurricularFace.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, margin, reduction, backend, skip_tolerance, centers: as the function's.
        alpha: in [0, 1], the weight of a batch.
        init_std: standard deviation of the initial weights; None: 0.01, as published.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).
        t: () float32 buffer, 0 at first.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, alpha or init_std; from a call, as the function.
    """

    loss = "curricularface"
    t: Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _CURRICULARFACE.scale,
        margin: float | Tensor = _CURRICULARFACE.margin,
        alpha: float = 0.01,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        validate.number("alpha", alpha, at_least=0.0, at_most=1.0)
        super().__init__(locals())
        self.alpha = alpha

    def _make_parameters(self, embedding_size: int, num_classes: int) -> None:
        super()._make_parameters(embedding_size, num_classes)
        self.register_buffer("t", torch.zeros(()))

    def reset_thresholds(self) -> None:
        """Sets t to 0 as well."""
        super().reset_thresholds()
        self.t.zero_()

    def variables(self) -> dict[str, Tensor]:
        return {"t": self.t}

    def after_batch(
        self, feats: Tensor, labels: Tensor, class_index: Tensor | None
    ) -> dict[str, Tensor]:
        return self._after(sum_over_ranks(self._sums(feats, labels, class_index)))

    def after_step(self, feats: Tensor, labels: Tensor, total: Total) -> dict[str, Tensor]:
        return self._after(total(self._sums(feats, labels)))

    def _shown(self) -> dict[str, Any]:
        return {**super()._shown(), "alpha": self.alpha}

    def _sums(self, feats: Tensor, labels: Tensor, class_index: Tensor | None = None) -> Tensor:
        """(2,) float64: the sum of the target cosines, and their number."""
        cosines = target_cosines(feats, self.weight, labels, class_index)
        return torch.stack([cosines.sum(dtype=torch.float64), (labels >= 0).sum()])

    def _after(self, sums: Tensor) -> dict[str, Tensor]:
        """t after a batch of these sums."""
        moved = torch.lerp(self.t, (sums[0] / sums[1]).to(self.t), self.alpha)
        return {"t": torch.where(moved.isfinite(), moved, self.t)}


class MVSoftmaxLoss(RegisteredClassLoss):
    """Class weights and MV-Softmax; see :func:`fused_mv_softmax_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, margin, t, margin_type, weighting, margin_at, reduction, backend, skip_tolerance,
            centers: as the function's.
        init_std: standard deviation of the initial weights; None: 0.01. The published code draws
            them uniformly and scales them to unit length.

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes or init_std; from a call, as the function.
    """

    loss = "mv_softmax"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _MV_SOFTMAX.scale,
        margin: float | Tensor = _MV_SOFTMAX.margin,
        t: float | Tensor = _MV_SOFTMAX.t,
        margin_type: str = _MV_SOFTMAX.margin_type,
        weighting: str = _MV_SOFTMAX.weighting,
        margin_at: str = _MV_SOFTMAX.margin_at,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        super().__init__(locals())
