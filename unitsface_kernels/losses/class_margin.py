"""Margin softmax with a margin for every class (LDAM, NeurIPS 2019; AdaptiveFace, CVPR 2019)."""

from __future__ import annotations

from .. import policy
from .custom import register
from .from_policy import spec_of
from .margin_softmax import SPEC as MARGIN_SOFTMAX


class ClassMargin(policy.Class):
    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    kind: policy.Number = policy.number("cos", choices=("cos", "arc"))
    margin: policy.PerIdentity = 0.4

    def positive(self, c):
        arc = self.kind == "arc"
        moved = policy.cosine_margin(c, 1.0, policy.where(arc, self.margin, 0.0))
        return self.scale * (moved - policy.where(arc, 0.0, self.margin))

    def negative(self, c):
        return self.scale * c


SPEC = register(
    spec_of(
        ClassMargin,
        name="class_margin",
        function="fused_class_margin_loss",
        source="LDAM (NeurIPS 2019), sec. 3.2, on cosines; AdaptiveFace (CVPR 2019)",
        tiles=MARGIN_SOFTMAX,
    )
)
