"""USS: unified threshold integrated sample-to-sample loss (UniTSFace, NeurIPS 2023)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .spec import LossSpec, Parameter


def _positive(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, margin = params
    assert threshold is not None
    return -F.logsigmoid(scale * (cosine - margin) - threshold)


def _negative(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, _ = params
    assert threshold is not None
    return -F.logsigmoid(threshold - scale * cosine)


SPEC = LossSpec(
    name="uss",
    topology="pair",
    reduction="sum",
    threshold="scalar",
    parameters=(Parameter("scale", 64.0, minimum=0.0), Parameter("margin", 0.1)),
    negative=_negative,
    positive=_positive,
    function="fused_uss_loss",
    source="UniTSFace (NeurIPS 2023), eq. 11; with a margin eq. 24 (USS-m)",
)
