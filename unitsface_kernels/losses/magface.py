"""MagFace: an angular margin that grows with the norm, and a term of the norm (CVPR 2021)."""

from __future__ import annotations

import math

from .. import policy
from .custom import register
from .from_policy import spec_of
from .margin_softmax import SPEC as MARGIN_SOFTMAX


class MagFace(policy.Class):
    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    l_a: policy.Number = policy.number(10.0, above=0.0)
    u_a: policy.Number = policy.number(110.0, above=0.0)
    l_margin: policy.Number = policy.number(0.45, at_least=0.0, maximum=math.pi)
    u_margin: policy.Number = policy.number(0.8, at_least=0.0, maximum=math.pi)
    lambda_g: policy.Number = policy.number(35.0, at_least=0.0)
    margin_type: policy.Number = policy.number("easy", choices=("easy", "hard"))

    def positive(self, c):
        growth = (self.u_margin - self.l_margin) / (self.u_a - self.l_a)
        margin = growth * (self._norm() - self.l_a) + self.l_margin
        cosine, sine = policy.cos(margin), policy.sin(margin)
        moved = c * cosine - policy.sine(c) * sine
        easy = policy.where(c > 0.0, moved, c)
        # cos and sin of pi - margin.
        hard = policy.where(c > -cosine, moved, c - sine * margin)
        return self.scale * policy.where(self.margin_type == "easy", easy, hard)

    def negative(self, c):
        return self.scale * c

    def regularizer(self):
        return self.lambda_g * (self._norm() / policy.square(self.u_a) + 1.0 / self._norm())

    def _norm(self):
        return policy.clamp(self.row_norm, self.l_a, self.u_a)


SPEC = register(
    spec_of(
        MagFace,
        name="magface",
        function="fused_magface_loss",
        source="MagFace (CVPR 2021), eq. 3, as in the published code",
        tiles=MARGIN_SOFTMAX,
    )
)
