"""SphereFace2 with its class weights and bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import functional, validate
from ..losses import REGISTRY
from .class_loss import ClassLoss, Comparison


class SphereFace2Loss(ClassLoss):
    """Class weights, bias and SphereFace2; see :func:`fused_sphereface2_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, margin, t, alpha, loss_weight, margin_type, margin_gradient, reduction, backend,
            skip_tolerance:
            as the function's.
        init_std: standard deviation of the initial weights; None: (2 / (C + D)) ** 0.5, Xavier's
            normal rule, as published (which then overwrites weights by their unit vectors at every
            step, see docs/math.md).

    Attributes:
        weight: (C, D) parameter.
        bias: () parameter b, initialized as published to where d loss / d b = 0 if all cosines
            are 0; of all C classes, whatever the ``sample_rate`` of :class:`PartialFC`.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.
    """

    #: Name in the registry of losses.
    loss = "sphereface2"

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float = 40.0,
        margin: float = 0.4,
        t: float = 3.0,
        alpha: float = 0.7,
        loss_weight: float = 50.0,
        margin_type: str = "C",
        margin_gradient: str = "detached",
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        validate.positive_int("embedding_size", embedding_size)
        validate.positive_int("num_classes", num_classes)
        std = math.sqrt(2.0 / (embedding_size + num_classes))
        super().__init__(
            *(embedding_size, num_classes, reduction, backend, std, init_std, skip_tolerance)
        )
        self.options: dict[str, float | str] = {
            "scale": scale,
            "margin": margin,
            "t": t,
            "alpha": alpha,
            "loss_weight": loss_weight,
            "margin_type": margin_type,
            "margin_gradient": margin_gradient,
        }
        validate.parameters(REGISTRY[self.loss], self.options)
        self.bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_thresholds(self) -> None:
        nn.init.constant_(self.bias, self._initial_bias())

    def comparisons(self) -> list[Comparison]:
        return [Comparison(REGISTRY[self.loss], self.options, self.weight, self.bias)]

    def _initial_bias(self) -> float:
        """The root of alpha sigma(-(a_y + b)) = (1 - alpha) (C - 1) sigma(a_j + b).

        a_y and a_j are the logits at right angles without the bias. A quadratic in e^b, solved
        without overflow. Without other classes there is none, and the bias is 0.
        """
        names = ("scale", "margin", "t", "alpha")
        scale, margin, t, alpha = (float(self.options[name]) for name in names)
        others = (1.0 - alpha) * (self.num_classes - 1)
        if others == 0.0:
            return 0.0

        def adjusted(cosine: float) -> float:
            return 2.0 * ((cosine + 1.0) / 2.0) ** t - 1.0

        if self.options["margin_type"] == "C":
            target, other = scale * (adjusted(0.0) - margin), scale * (adjusted(0.0) + margin)
        else:
            target = scale * adjusted(math.cos(min(math.pi, math.pi / 2.0 + margin)))
            other = scale * adjusted(0.0)
        z = alpha / others
        root = math.sqrt((1.0 - z) ** 2 + 4.0 * z * math.exp(target - other))
        if z <= 1.0:
            return math.log(2.0 * z) - other - math.log(1.0 - z + root)
        # The same number; 1 - z + root would cancel.
        return math.log(root + z - 1.0) - math.log(2.0) - target

    @property
    def scale(self) -> float:
        return float(self.options["scale"])

    def forward(self, feats: Tensor, labels: Tensor, class_index: Tensor | None = None) -> Tensor:
        return functional.fused_sphereface2_loss(
            feats,
            self.weight,
            labels,
            self.bias,
            **self.options,  # type: ignore[arg-type]
            class_index=class_index,
            reduction=self.reduction,
            backend=self.backend,
            skip_tolerance=self.skip_tolerance,
        )

    def extra_repr(self) -> str:
        classes, size = self.weight.shape
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return (
            f"embedding_size={size}, num_classes={classes}, {options}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
