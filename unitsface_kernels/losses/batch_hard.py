"""Triplet: a row's hardest positive against its hardest negatives (batch-hard, 2017)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of

#: Squared distances below it count as it, and have no slope, as in ``contrastive.py``.
_LEAST = 1e-4


class BatchHard(policy.Pair):
    combine = "topk"
    margin: policy.Number = 0.2
    k: policy.Number = policy.number(1, above=0, maximum=64, integer=True)
    distance: policy.Number = policy.number("squared", choices=("squared", "euclidean"))
    hinge: policy.Number = policy.number("hard", choices=("hard", "soft"))

    def triplet(self, nearest, target):
        gap = self._distance(target) - self._distance(nearest)
        # At 0 the derivative is 0, and NaN stays.
        hard = policy.where(gap + self.margin <= 0, 0, gap + self.margin)
        return policy.where(self.hinge == "hard", hard, policy.softplus(gap))

    def _distance(self, c):
        squared = 2 - 2 * c
        euclidean = policy.sqrt(policy.maximum(squared, _LEAST))
        return policy.where(self.distance == "euclidean", euclidean, squared)


SPEC = spec_of(
    BatchHard,
    name="batch_hard",
    function="fused_triplet_loss",
    source="Batch-hard triplets (Hermans et al., arXiv 1703.07737), eq. 5; FaceNet (CVPR 2015)",
    valid_rows="with_both",
)
