"""Log-sum-exp of every row's negatives, from which UniTSFace's threshold is initialized."""

from __future__ import annotations

import math

from .. import policy
from .from_policy import spec_of


class PairLogsumexp(policy.Pair):
    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    lower: policy.Number = -2.0
    upper: policy.Number = 2.0

    def negative(self, c):
        # False for NaN, which stays.
        outside = (c < self.lower) | (c > self.upper)
        return policy.where(outside, -math.inf, self.scale * c)


SPEC = spec_of(
    PairLogsumexp,
    name="pair_logsumexp",
    function="fused_pair_logsumexp",
    source="UniTSFace (NeurIPS 2023), published code: initialization of the threshold",
    valid_rows="with_negatives",
)
