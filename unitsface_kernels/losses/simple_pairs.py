"""SimPLE: logistic pairs by inner products above a share of the norms' product (ICCV 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from .. import policy
from .from_policy import spec_of


class Score:
    """The formula for samples with samples, or with proxies."""

    normalize = False
    combine: ClassVar[Any] = "softplus"
    b_theta: policy.Number = 0.3
    alpha: policy.Number = policy.number(0.001, at_least=0.0, maximum=1.0)
    r: policy.Number = policy.number(2.0, above=0.0)
    margin: policy.Number = 0.0
    loss_weight: policy.Number = policy.number(500.0, above=0.0)
    b: policy.Threshold

    def positive(self, c):
        return (self._score(c) - self.margin + self.b) / self.r

    def negative(self, c):
        return (self._score(c) + self.margin + self.b) * self.r

    def _score(self, c):
        return c - self.b_theta * self.row_norm * self.column_norm

    def positive_weight(self):
        return self.loss_weight * self.alpha / self.positives_per_row

    def negative_weight(self):
        return self.loss_weight * (1 - self.alpha) / self.negatives_per_row


class SimPLE(Score, policy.Pair):
    pass


SPEC = spec_of(
    SimPLE,
    name="simple_pairs",
    function="fused_simple_loss",
    source="SimPLE (ICCV 2023), published code",
)
