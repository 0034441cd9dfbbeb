"""Circle: pairs weighted by how far they are from their optimum (CVPR 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import Finish, LossSpec, Parameter


def _positive(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, margin = params
    weight = torch.relu(1.0 + margin - cosine).detach()
    return -scale * weight * (cosine - (1.0 - margin))


def _negative(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, margin = params
    weight = torch.relu(cosine + margin).detach()
    return scale * weight * (cosine - margin)


def _value(positives: Tensor, negatives: Tensor, params: tuple[float, ...]) -> Tensor:
    return -F.logsigmoid(-(positives + negatives))


def _slopes(
    positives: Tensor, negatives: Tensor, params: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    share = torch.sigmoid(positives + negatives)
    return share, share


def _slope_bound(params: tuple[float, ...]) -> float:
    """The weight of a positive at cosine -1, or of a negative at 1."""
    scale, margin = params
    return scale * max(2.0 + margin, 1.0 + margin, 0.0)


SPEC = LossSpec(
    name="circle",
    topology="pair",
    reduction="logsumexps",
    threshold="none",
    parameters=(Parameter("scale", 256.0, minimum=0.0), Parameter("margin", 0.25)),
    negative=_negative,
    positive=_positive,
    function="fused_circle_loss",
    source="Circle loss (CVPR 2020), eq. 6",
    slope_bound=_slope_bound,
    finish=Finish(_value, _slopes),
)
