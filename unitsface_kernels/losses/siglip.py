"""SigLIP: a logistic decision of every pair of two towers (ICCV 2023)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class SigLIP(policy.Pair):
    combine = "softplus"
    scale: policy.Scalar = 10.0
    b: policy.Threshold

    def positive(self, c):
        return self.scale * c - self.b

    def negative(self, c):
        return self.scale * c - self.b


SPEC = spec_of(
    SigLIP,
    name="siglip",
    function="fused_siglip_loss",
    source="SigLIP (ICCV 2023), eq. 3",
)
