"""AdaCos: softmax over cosines at a scale that follows the batches (CVPR 2019)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class AdaCos(policy.Class):
    combine = "logsumexp"
    scale: policy.Scalar

    def positive(self, c):
        return self.scale * c

    def negative(self, c):
        return self.scale * c


SPEC = spec_of(
    AdaCos,
    name="adacos",
    function="fused_adacos_loss",
    source="AdaCos (CVPR 2019)",
)
