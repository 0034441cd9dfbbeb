"""UCE: unified cross-entropy over classes (UniFace, ICCV 2023), also called BCE-u."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .spec import LossSpec, Parameter


def _positive(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, margin, _, adaptive = params
    assert threshold is not None
    margin_of_pair = margin + adaptive * cosine.detach()
    return -F.logsigmoid(scale * (cosine - margin_of_pair) - threshold)


def _negative(cosine: Tensor, threshold: Tensor | None, params: tuple[float, ...]) -> Tensor:
    scale, _, negative_weight, _ = params
    assert threshold is not None
    return -negative_weight * F.logsigmoid(threshold - scale * cosine)


SPEC = LossSpec(
    name="uce",
    topology="class",
    reduction="sum",
    threshold="scalar",
    parameters=(
        Parameter("scale", 64.0, minimum=0.0),
        Parameter("margin", 0.4),
        Parameter("negative_weight", 1.0, minimum=0.0),
        Parameter("adaptive_margin", 0.0, at_least=0.0),
    ),
    negative=_negative,
    positive=_positive,
    function="fused_uce_loss",
    source="UniFace (ICCV 2023), unified cross-entropy with margin and balanced negatives",
)
