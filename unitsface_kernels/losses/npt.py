"""NPT: a triplet of each row, its class weight and the nearest wrong class weights."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class Npt(policy.Class):
    combine = "topk"
    margin: policy.Number = 1.0
    k: policy.Number = policy.number(1, above=0, maximum=64, integer=True)
    hinges: policy.Number = policy.number("mean", choices=("mean", "sum"))

    def triplet(self, nearest, target):
        # Squared distance to the target minus that to a wrong column, plus the margin.
        gap = 2 * (nearest - target) + self.margin
        # At 0 the derivative is 0, and NaN stays.
        return policy.where(gap <= 0, 0, gap)


SPEC = spec_of(
    Npt,
    name="npt",
    function="fused_npt_loss",
    source="NPT-Loss (arXiv 2103.03503), code of its later version",
)
