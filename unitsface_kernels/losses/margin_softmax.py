"""Margin softmax: NormFace, CosFace, ArcFace, SphereFace-R and their combination."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import LossSpec, Parameter


def _target_cosine(cosine: Tensor, m1: float, m2: float) -> Tensor:
    """cos(m1 * theta + m2), continued monotonically past pi as (-1)^k cos(.) - 2k.

    The angle is taken from a cosine clipped to [-1, 1]; at the clip (theta = 0 or pi) the
    derivative of acos is infinite, and the package defines d theta / d cos through
    sin(theta) >= 1e-4 there, so that every backend returns the same finite gradient.
    """
    if m1 == 1.0 and m2 == 0.0:
        return cosine
    clipped = cosine.clamp(-1.0, 1.0)
    theta = torch.acos(clipped.detach())
    angle = m1 * theta + m2
    k = torch.floor(angle / math.pi)
    sign = 1.0 - 2.0 * torch.remainder(k, 2.0)
    value = sign * torch.cos(angle) - 2.0 * k
    sin_theta = torch.sqrt((1.0 - clipped.detach() ** 2).clamp_min(1e-8))
    slope = sign * torch.sin(angle) * m1 / sin_theta
    return value + slope * (cosine - cosine.detach())


def _positive(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, m1, m2, m3, detached, adaptive = params
    shrunk = cosine - adaptive * cosine.detach()
    target = _target_cosine(shrunk, m1, m2)
    if detached:
        target = shrunk + (target - shrunk).detach()
    return scale * (target - m3)


def _negative(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    return params[0] * cosine


SPEC = LossSpec(
    name="margin_softmax",
    topology="class",
    reduction="logsumexp",
    threshold="none",
    parameters=(
        Parameter("scale", 64.0, minimum=0.0),
        Parameter("m1", 1.0, minimum=0.0),
        Parameter("m2", 0.0),
        Parameter("m3", 0.4),
        Parameter("margin_gradient", "exact", choices=("exact", "detached")),
        Parameter("adaptive_margin", 0.0, at_least=0.0),
    ),
    negative=_negative,
    positive=_positive,
    function="fused_margin_softmax_loss",
    source="CosFace (CVPR 2018) eq. 4, ArcFace (CVPR 2019) eq. 3, combined margin ArcFace eq. 4",
)
