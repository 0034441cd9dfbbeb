"""SphereFace2 with its class weights and bias."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .. import validate
from ..losses.sphereface2 import SPEC
from .class_loss import RegisteredClassLoss
from .registered import host_number

_DEFAULT = SPEC.default


class SphereFace2Loss(RegisteredClassLoss):
    """Class weights, bias and SphereFace2; see :func:`fused_sphereface2_loss`.

    Args:
        embedding_size: D.
        num_classes: C.
        scale, margin, t, alpha, loss_weight, margin_type, margin_gradient, reduction, backend,
            skip_tolerance, centers: as the function's.
        init_std: standard deviation of the initial weights; None: (2 / (C + D)) ** 0.5, Xavier's
            normal rule, as published (which then overwrites weights by their unit vectors at every
            step, see docs/math.md).

    Attributes:
        weight: (C, D) parameter, with several centers (C, centers, D).
        bias: () parameter b, initialized as published to where d loss / d b = 0 if all cosines
            are 0; of all C classes, whatever the ``sample_rate`` of :class:`PartialFC`.

    Shape:
        feats (N, D), labels (N,) integers in [0, C) or -1, optionally class_index (K,)
        -> () float32.

    Raises:
        TypeError, ValueError: wrong sizes, init_std or parameters; from a call, as the function.
    """

    loss = "sphereface2"
    _threshold_name = "bias"
    bias: nn.Parameter
    scale: float | Tensor

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        scale: float | Tensor = _DEFAULT.scale,
        margin: float | Tensor = _DEFAULT.margin,
        t: float | Tensor = _DEFAULT.t,
        alpha: float | Tensor = _DEFAULT.alpha,
        loss_weight: float | Tensor = _DEFAULT.loss_weight,
        margin_type: str = _DEFAULT.margin_type,
        margin_gradient: str = _DEFAULT.margin_gradient,
        reduction: str = "mean",
        backend: str = "auto",
        skip_tolerance: float = 0.0,
        init_std: float | None = None,
        centers: int = 1,
    ) -> None:
        super().__init__(locals())

    def _keep_values(self, values: dict[str, Any]) -> None:
        # The initial bias is computed from them.
        validate.parameters(self.spec, values)
        super()._keep_values(values)

    def _default_std(self, embedding_size: int) -> float:
        return math.sqrt(2.0 / (embedding_size + self.num_classes))

    @property
    def options(self) -> dict[str, float | str | Tensor]:
        """Parameters of the loss."""
        return self.values()

    def reset_thresholds(self) -> None:
        nn.init.constant_(self.bias, self._initial_bias())

    def _initial_bias(self) -> float:
        """The root of alpha sigma(-(a_y + b)) = (1 - alpha) (C - 1) sigma(a_j + b).

        a_y and a_j are the logits at right angles without the bias. A quadratic in e^b, solved
        without overflow. Without other classes there is none, and the bias is 0.
        """
        names = ("scale", "margin", "t", "alpha")
        scale, margin, t, alpha = (host_number(getattr(self, name)) for name in names)
        others = (1.0 - alpha) * (self.num_classes - 1)
        if others == 0.0:
            return 0.0

        def adjusted(cosine: float) -> float:
            return 2.0 * ((cosine + 1.0) / 2.0) ** t - 1.0

        if self.values()["margin_type"] == "C":
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
