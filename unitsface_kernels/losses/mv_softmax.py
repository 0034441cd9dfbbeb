"""MV-Softmax: negatives beyond the target's margin get larger logits (AAAI 2020)."""

from __future__ import annotations

import math

from .. import policy
from .from_policy import spec_of


class MVSoftmax(policy.Class):
    combine = "logsumexp"
    scale: policy.Number = policy.number(32.0, above=0.0)
    margin: policy.Number = policy.number(0.35, at_least=0.0, maximum=math.pi)
    t: policy.Number = policy.number(0.2, at_least=0.0)
    margin_type: policy.Number = policy.number("am", choices=("am", "arc"))
    weighting: policy.Number = policy.number("adaptive", choices=("adaptive", "fixed"))
    margin_at: policy.Number = policy.number("acute", choices=("acute", "all"))

    def positive(self, c):
        all_have_it = self.margin_at == "all"
        return self.scale * policy.where(all_have_it | (c > 0), self._with_margin(c), c)

    def negative(self, c):
        hard = c > self._with_margin(self.target_cosine)
        # t (c + 1), or t.
        growth = policy.where(self.weighting == "adaptive", self.t, 0.0) * c + self.t
        return self.scale * policy.where(hard, c + growth, c)

    def _with_margin(self, c):
        # cos(theta + margin), which rises again beyond pi.
        turned = c * policy.cos(self.margin) - policy.sine(c) * policy.sin(self.margin)
        return policy.where(self.margin_type == "am", c - self.margin, turned)


SPEC = spec_of(
    MVSoftmax,
    name="mv_softmax",
    function="fused_mv_softmax_loss",
    source="Mis-classified Vector Guided Softmax (AAAI 2020), published code",
)
