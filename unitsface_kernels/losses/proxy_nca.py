"""Proxy-NCA: softmax of squared distances to proxies (ICCV 2017; ++: ECCV 2020)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class ProxyNCA(policy.Class):
    combine = "logsumexps"
    scale: policy.Number = policy.number(9.0, above=0.0)
    denominator: policy.Number = policy.number("negatives", choices=("negatives", "all"))

    def positive(self, c):
        return 2 * self.scale * c

    def negative(self, c):
        # Minus the squared distance 2 - 2 c of unit vectors, but for a constant, which cancels.
        return 2 * self.scale * c

    def finish(self, positives, negatives):
        ratio = negatives - positives
        # Without negatives the loss is 0.
        ratio = policy.where(negatives < -1e29, 0, ratio)
        return policy.where(self.denominator == "all", policy.softplus(ratio), ratio)


SPEC = spec_of(
    ProxyNCA,
    name="proxy_nca",
    function="fused_proxy_nca_loss",
    source="Proxy-NCA (ICCV 2017), eq. 4; ProxyNCA++ (ECCV 2020), eq. 6",
)
