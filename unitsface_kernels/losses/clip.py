"""CLIP: softmax cross-entropy of every row of two towers against the other tower (ICML 2021)."""

from __future__ import annotations

from .. import policy
from .from_policy import spec_of


class CLIP(policy.Pair):
    combine = "logsumexps"
    scale: policy.Scalar = 14.285714

    def positive(self, c):
        return self.scale * c

    def negative(self, c):
        return self.scale * c

    def finish(self, positives, negatives):
        # For one positive, exact where log(e^p + e^n) - p cancels.
        return policy.softplus(negatives - positives)


SPEC = spec_of(
    CLIP,
    name="clip",
    function="fused_clip_loss",
    source="CLIP (ICML 2021), fig. 3; ConVIRT (MLHC 2022), eq. 2 to 4",
    valid_rows="with_positives",
)
