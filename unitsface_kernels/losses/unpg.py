"""UNPG: negative pairs of the batch beside the wrong classes of a margin softmax (BMVC 2022)."""

from __future__ import annotations

from .. import policy
from .custom import register
from .from_policy import spec_of
from .margin_softmax import SPEC as MARGIN_SOFTMAX
from .margin_softmax import MarginSoftmax


class UNPG(MarginSoftmax):
    """``log_pairs``: log of the sum over the pairs, as one more negative of every row."""

    combine = "logsumexps"  # type: ignore[assignment]
    m3: policy.Number = 0.5
    log_pairs: policy.Scalar

    def finish(self, positives, negatives):
        of_pairs = policy.softplus(self.log_pairs - positives)
        # In this order the derivative by the negatives does not cancel where pairs outweigh them.
        return of_pairs + policy.softplus(negatives - positives - of_pairs)


SPEC = register(
    spec_of(
        UNPG,
        name="unpg",
        function="fused_unpg_loss",
        source="UNPG (BMVC 2022), as in the published code",
        tiles=MARGIN_SOFTMAX,
    )
)
