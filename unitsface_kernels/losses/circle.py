"""Circle: pairs weighted by how far they are from their optimum (CVPR 2020)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class Circle(policy.Pair):
    combine = "logsumexps"
    scale: policy.Number = policy.number(256.0, above=0.0)
    margin: policy.Number = 0.25

    def positive(self, c):
        weight = policy.detach(policy.maximum(1 + self.margin - c, 0))
        return -self.scale * weight * (c - (1 - self.margin))

    def negative(self, c):
        weight = policy.detach(policy.maximum(c + self.margin, 0))
        return self.scale * weight * (c - self.margin)

    def finish(self, positives, negatives):
        return policy.softplus(positives + negatives)


SPEC = spec_of(
    Circle,
    name="circle",
    function="fused_circle_loss",
    source="Circle loss (CVPR 2020), eq. 6",
)
