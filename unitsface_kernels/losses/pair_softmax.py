"""Pair softmax: every positive of a row against all of its negatives (UniTSFace, NeurIPS 2023)."""

from __future__ import annotations

from torch import Tensor

from .spec import LossSpec, Parameter


def _positive(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, margin = params
    return scale * (cosine - margin)


def _negative(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, _ = params
    return scale * cosine


SPEC = LossSpec(
    name="pair_softmax",
    topology="pair",
    reduction="logsumexp",
    threshold="none",
    parameters=(Parameter("scale", 64.0, minimum=0.0), Parameter("margin", 0.1)),
    negative=_negative,
    positive=_positive,
    function="fused_pair_softmax_loss",
    source="UniTSFace (NeurIPS 2023), eq. 17; multi-class N-pair (NIPS 2016), eq. 6",
    valid_rows="with_positives",
)
