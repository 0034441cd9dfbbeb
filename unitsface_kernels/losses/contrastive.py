"""Contrastive: squared hinges of distances, with a margin for either kind of pair (CVPR 2006)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of

#: Squared distances below it count as it, and have no slope: that of a distance by its cosine grows
#: without bound, and rounding of cosines near 1 would decide it.
_LEAST = 1e-4


class Contrastive(policy.Pair):
    positive_margin: policy.Number = policy.number(0.0, at_least=0.0)
    negative_margin: policy.Number = policy.number(1.0, at_least=0.0)
    distance: policy.Number = policy.number("euclidean", choices=("euclidean", "cosine"))

    def positive(self, c):
        return 0.5 * policy.square(policy.maximum(self._distance(c) - self.positive_margin, 0))

    def negative(self, c):
        return 0.5 * policy.square(policy.maximum(self.negative_margin - self._distance(c), 0))

    def _distance(self, c):
        euclidean = policy.sqrt(policy.maximum(2 - 2 * c, _LEAST))
        return policy.where(self.distance == "euclidean", euclidean, 1 - c)


SPEC = spec_of(
    Contrastive,
    name="contrastive",
    function="fused_contrastive_loss",
    source="Contrastive loss (CVPR 2006), eq. 4",
)
