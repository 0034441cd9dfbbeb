"""Pair softmax: every positive of a row against all of its negatives (UniTSFace, NeurIPS 2023)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class PairSoftmax(policy.Pair):
    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.1

    def positive(self, c):
        return self.scale * (c - self.margin)

    def negative(self, c):
        return self.scale * c


SPEC = spec_of(
    PairSoftmax,
    name="pair_softmax",
    function="fused_pair_softmax_loss",
    source="UniTSFace (NeurIPS 2023), eq. 17; multi-class N-pair (NIPS 2016), eq. 6",
    valid_rows="with_positives",
)
