"""Margin softmax without the gradient of negatives that are too similar: wrong labels, maybe."""

from __future__ import annotations

from typing import Any

from .. import policy
from . import margin_softmax
from .from_policy import spec_of
from .spec import LossSpec


class FilteredMarginSoftmax(margin_softmax.MarginSoftmax):
    interclass_filtering_threshold: policy.Number = policy.number(0.0, at_least=0.0, maximum=1.0)

    def negative(self, c):
        limit = self.interclass_filtering_threshold
        # As published: the logit is that of a right angle, and 0 filters nothing.
        return policy.where((limit > 0) & (c > limit), 0, self.scale * c)


SPEC = spec_of(
    FilteredMarginSoftmax,
    name="filtered_margin_softmax",
    function="fused_margin_softmax_loss",
    source="as margin_softmax, with the filter of CombinedMarginLoss in insightface's code",
)


def chosen(values: dict[str, Any]) -> tuple[LossSpec, dict[str, Any]]:
    """The loss for the values of all its parameters, with those that it has: where nothing is
    filtered, ``margin_softmax``, whose kernels cost less.
    """
    limit = values["interclass_filtering_threshold"]
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit != 0:
        return SPEC, values
    return margin_softmax.SPEC, {name: values[name] for name in margin_softmax.SPEC.defaults()}
