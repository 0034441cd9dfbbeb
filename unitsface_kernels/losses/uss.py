"""USS: unified threshold integrated sample-to-sample loss (UniTSFace, NeurIPS 2023)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class USS(policy.Pair):
    combine = "softplus"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.1
    b: policy.Threshold

    def positive(self, c):
        return self.scale * (c - self.margin) - self.b

    def negative(self, c):
        return self.scale * c - self.b


SPEC = spec_of(
    USS,
    name="uss",
    function="fused_uss_loss",
    source="UniTSFace (NeurIPS 2023), eq. 11; with a margin eq. 24 (USS-m)",
)
