"""UCE: unified cross-entropy over classes (UniFace, ICCV 2023), also called BCE-u."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class UCE(policy.Class):
    combine = "softplus"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.4
    negative_weight: policy.Number = policy.number(1.0, above=0.0)
    adaptive_margin: policy.Number = policy.number(0.0, at_least=0.0)
    b: policy.Threshold

    def positive(self, c):
        margin = self.margin + self.adaptive_margin * policy.detach(c)
        return self.scale * (c - margin) - self.b

    def negative(self, c):
        return self.scale * c - self.b


SPEC = spec_of(
    UCE,
    name="uce",
    function="fused_uce_loss",
    source="UniFace (ICCV 2023), unified cross-entropy with margin and balanced negatives",
)
