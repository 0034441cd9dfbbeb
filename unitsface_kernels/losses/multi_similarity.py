"""Multi-Similarity: soft hinges of the hardest positives and negatives of a row (CVPR 2019)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class MultiSimilarity(policy.Pair):
    combine = "logsumexps"
    alpha: policy.Number = policy.number(2.0, above=0.0)
    beta: policy.Number = policy.number(50.0, above=0.0)
    base: policy.Number = 0.5

    def positive(self, c):
        return -self.alpha * (c - self.base)

    def negative(self, c):
        return self.beta * (c - self.base)

    def finish(self, positives, negatives):
        return policy.softplus(positives) / self.alpha + policy.softplus(negatives) / self.beta


SPEC = spec_of(
    MultiSimilarity,
    name="multi_similarity",
    function="fused_multi_similarity_loss",
    source="Multi-Similarity (CVPR 2019), without its mining of pairs",
)
