"""Log-sum-exp of every row's negatives, from which UniTSFace's threshold is initialized."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import LossSpec, Parameter


def _negative(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, lower, upper = params
    # False for NaN, which stays.
    outside = (cosine < lower) | (cosine > upper)
    return torch.where(outside, -torch.inf, scale * cosine)


SPEC = LossSpec(
    name="pair_logsumexp",
    topology="pair",
    reduction="logsumexp",
    threshold="none",
    parameters=(
        Parameter("scale", 64.0, minimum=0.0),
        Parameter("lower", -2.0),
        Parameter("upper", 2.0),
    ),
    negative=_negative,
    positive=None,
    function="fused_pair_logsumexp",
    source="UniTSFace (NeurIPS 2023), published code: initialization of the threshold",
    valid_rows="with_negatives",
)
