"""Margin softmax: NormFace, CosFace, ArcFace, SphereFace-R and their combination."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class MarginSoftmax(policy.Class):
    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    m1: policy.Number = policy.number(1.0, above=0.0)
    m2: policy.Number = 0.0
    m3: policy.Number = 0.4
    margin_gradient: policy.Number = policy.number("exact", choices=("exact", "detached"))
    adaptive_margin: policy.Number = policy.number(0.0, at_least=0.0)

    def positive(self, c):
        c = c - self.adaptive_margin * policy.detach(c)
        target = policy.cosine_margin(c, self.m1, self.m2)
        detached = c + policy.detach(target - c)
        target = policy.where(self.margin_gradient == "detached", detached, target)
        return self.scale * (target - self.m3)

    def negative(self, c):
        return self.scale * c


SPEC = spec_of(
    MarginSoftmax,
    name="margin_softmax",
    function="fused_margin_softmax_loss",
    source="CosFace (CVPR 2018) eq. 4, ArcFace (CVPR 2019) eq. 3, combined margin ArcFace eq. 4",
)
