"""SphereFace2: binary classification on the sphere, with an additive or an angular margin."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import LossSpec, Parameter


def _moved(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta + margin), -1 once the angle passes pi.

    As for every angular margin of the package, sin(theta) >= 1e-4 in the derivative at the ends.
    """
    clipped = cosine.detach().clamp(-1.0, 1.0)
    sine = torch.sqrt((1.0 - clipped) * (1.0 + clipped))
    value = clipped * math.cos(margin) - sine * math.sin(margin)
    slope = math.cos(margin) + clipped * math.sin(margin) / sine.clamp_min(1e-4)
    past = clipped < -math.cos(margin)
    value, slope = torch.where(past, -1.0, value), torch.where(past, 0.0, slope)
    return value + slope * (cosine - cosine.detach())


def _logit(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...], positive: bool):
    scale, margin, t, _, _, angular, exact = params
    assert threshold is not None
    moved = _moved(cosine, margin) if positive and angular else cosine
    adjusted = 2.0 * ((moved.clamp(-1.0, 1.0) + 1.0) / 2.0) ** t - 1.0
    if not exact:
        adjusted = cosine + (adjusted - cosine).detach()
    if not angular:
        adjusted = adjusted - margin if positive else adjusted + margin
    return scale * adjusted + threshold


def _positive(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, _, _, alpha, loss_weight, _, _ = params
    logit = _logit(cosine, threshold, params, positive=True)
    return -loss_weight / scale * alpha * F.logsigmoid(logit)


def _negative(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, _, _, alpha, loss_weight, _, _ = params
    logit = _logit(cosine, threshold, params, positive=False)
    return -loss_weight / scale * (1.0 - alpha) * F.logsigmoid(-logit)


def _slope_bound(params: tuple[float, ...]) -> float:
    """The largest |d value / d cosine|."""
    _, margin, t, alpha, loss_weight, angular, exact = params
    bound = loss_weight * max(alpha, 1.0 - alpha)
    if exact:
        bound *= max(t, 1.0)
        if angular:
            bound *= abs(math.cos(margin)) + 1e4 * math.sin(margin)
    return bound


SPEC = LossSpec(
    name="sphereface2",
    topology="class",
    reduction="sum",
    threshold="scalar",
    parameters=(
        Parameter("scale", 40.0, minimum=0.0),
        Parameter("margin", 0.4, at_least=0.0, maximum=math.pi),
        Parameter("t", 3.0, minimum=0.0),
        Parameter("alpha", 0.7, minimum=0.0, maximum=1.0),
        Parameter("loss_weight", 50.0, minimum=0.0),
        Parameter("margin_type", "C", choices=("C", "A")),
        Parameter("margin_gradient", "detached", choices=("detached", "exact")),
    ),
    negative=_negative,
    positive=_positive,
    function="fused_sphereface2_loss",
    slope_bound=_slope_bound,
    source="SphereFace2 (ICLR 2022), with the additive (C) and the angular (A) margin",
)
