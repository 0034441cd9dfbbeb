"""AdaFace: a margin by the norm of the row's features (CVPR 2022)."""

from __future__ import annotations

import math

from .. import policy
from .custom import register
from .from_policy import spec_of
from .margin_softmax import SPEC as MARGIN_SOFTMAX

#: Norms count as these at least and at most.
NORMS = (1e-3, 100.0)
#: As in the published code: bounds the target's cosine and angle, and is added to the deviation.
EPS = 1e-3


class AdaFace(policy.Class):
    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = policy.number(0.4, at_least=0.0)
    h: policy.Number = policy.number(0.333, at_least=0.0)
    mean: policy.Scalar = 20.0
    std: policy.Scalar = 100.0

    def positive(self, c):
        norm = policy.clamp(self.row_norm, *NORMS)
        quality = (norm - self.mean) / (self.std + EPS) * self.h
        quality = policy.detach(policy.clamp(quality, -1.0, 1.0))
        angle = policy.acos(policy.clamp(c, EPS - 1.0, 1.0 - EPS)) - self.margin * quality
        moved = policy.cos(policy.clamp(angle, EPS, math.pi - EPS))
        return self.scale * (moved - self.margin * (1.0 + quality))

    def negative(self, c):
        return self.scale * c


SPEC = register(
    spec_of(
        AdaFace,
        name="adaface",
        function="fused_adaface_loss",
        source="AdaFace (CVPR 2022), sec. 3.3, as in the published code",
        tiles=MARGIN_SOFTMAX,
    )
)
