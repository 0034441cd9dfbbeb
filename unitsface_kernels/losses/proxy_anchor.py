"""Proxy-Anchor: every proxy against the samples of a batch, its own and all others (CVPR 2020)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class ProxyAnchor(policy.Pair):
    """Rows are proxies, columns samples."""

    combine = "logsumexps"
    alpha: policy.Number = policy.number(32.0, above=0.0)
    margin: policy.Number = 0.1

    def positive(self, c):
        return -self.alpha * (c - self.margin)

    def negative(self, c):
        return self.alpha * (c + self.margin)

    def finish(self, positives, negatives):
        # Terms of positives are averaged over the proxies that have some.
        own = policy.softplus(positives) / self.share_with_positives
        return own + policy.softplus(negatives)


SPEC = spec_of(
    ProxyAnchor,
    name="proxy_anchor",
    function="fused_proxy_anchor_loss",
    source="Proxy-Anchor (CVPR 2020), eq. 4",
)
