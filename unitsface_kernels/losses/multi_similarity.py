"""Multi-Similarity: soft hinges of the hardest positives and negatives of a row (CVPR 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import Finish, LossSpec, Parameter


def _positive(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    alpha, _, base = params
    return -alpha * (cosine - base)


def _negative(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    _, beta, base = params
    return beta * (cosine - base)


def _value(positives: Tensor, negatives: Tensor, params: tuple[float, ...]) -> Tensor:
    alpha, beta, _ = params
    return -F.logsigmoid(-positives) / alpha - F.logsigmoid(-negatives) / beta


def _slopes(
    positives: Tensor, negatives: Tensor, params: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    alpha, beta, _ = params
    return torch.sigmoid(positives) / alpha, torch.sigmoid(negatives) / beta


def _slope_bound(params: tuple[float, ...]) -> float:
    return max(params[:2])


SPEC = LossSpec(
    name="multi_similarity",
    topology="pair",
    reduction="logsumexps",
    threshold="none",
    parameters=(
        Parameter("alpha", 2.0, minimum=0.0),
        Parameter("beta", 50.0, minimum=0.0),
        Parameter("base", 0.5),
    ),
    negative=_negative,
    positive=_positive,
    function="fused_multi_similarity_loss",
    source="Multi-Similarity (CVPR 2019), without its mining of pairs",
    slope_bound=_slope_bound,
    finish=Finish(_value, _slopes),
)
