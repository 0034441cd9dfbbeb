"""Losses of metric learning over pairs of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import validate
from ..distributed.collectives import Group
from ..losses import batch_hard, contrastive, simple_pairs
from .pair import RegisteredPairLoss

_CONTRASTIVE, _HARD = contrastive.SPEC.default, batch_hard.SPEC.default
_SIMPLE = simple_pairs.SPEC.default


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


class SimPLELoss(RegisteredPairLoss):
    """SimPLE with its learnable bias; see :func:`fused_simple_loss`.

    Args:
        b_theta, alpha, r, margin, loss_weight, reduction, backend, skip_tolerance, group, exchange:
            as the function's. Defaults are those of the published configuration for MS1M.
        init_bias: first value of b.

    Attributes:
        bias: () parameter b.

    Shape:
        feats (N, D), labels (N,) and optionally memory (M, D), memory_labels (M,) and the int
        batch_offset -> () float32.

    Raises:
        TypeError, ValueError: a wrong init_bias; from a call, as the function.
    """

    loss = "simple_pairs"
    init_bias: float
    bias: nn.Parameter

    def __init__(
        self,
        b_theta: float = _SIMPLE.b_theta,
        alpha: float = _SIMPLE.alpha,
        r: float = _SIMPLE.r,
        margin: float = _SIMPLE.margin,
        loss_weight: float = _SIMPLE.loss_weight,
        init_bias: float = -10.0,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        group: Group = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(locals())
        validate.number("init_bias", init_bias)
        self.init_bias = init_bias
        self.bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.bias, self.init_bias)

    def _thresholds(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"b": self.bias}

    def _shown(self) -> dict[str, Any]:
        return {**self.values(), "init_bias": self.init_bias, **super()._shown()}
