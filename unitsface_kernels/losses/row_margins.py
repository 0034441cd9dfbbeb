"""Margin softmax with margins of every row's own."""

from __future__ import annotations

from .. import policy
from .custom import register
from .from_policy import spec_of
from .margin_softmax import SPEC as MARGIN_SOFTMAX
from .margin_softmax import MarginSoftmax


class RowMargins(MarginSoftmax):
    m1: policy.PerRow
    m2: policy.PerRow
    m3: policy.PerRow


SPEC = register(
    spec_of(
        RowMargins,
        name="row_margins",
        function="fused_margin_softmax_loss",
        source="that of margin_softmax, with a margin per row",
        tiles=MARGIN_SOFTMAX,
    )
)
