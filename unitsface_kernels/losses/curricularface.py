"""CurricularFace: negatives beyond the target's margin weigh more as training goes on."""

from __future__ import annotations

import math
from dataclasses import replace

from .. import policy
from .from_policy import spec_of


class CurricularFace(policy.Class):
    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = policy.number(0.5, at_least=0.0, maximum=math.pi)
    t: policy.Scalar

    def positive(self, c):
        # Where the angle would pass pi the published code goes on in a straight line.
        line = c - self.margin * policy.sin(self.margin)
        return self.scale * policy.where(c > -policy.cos(self.margin), self._turned(c), line)

    def negative(self, c):
        hard = c > self._turned(self.target_cosine)
        return self.scale * policy.where(hard, c * (self.t + c), c)

    def _turned(self, c):
        """cos(theta + margin), which rises again beyond pi."""
        return c * policy.cos(self.margin) - policy.sine(c) * policy.sin(self.margin)


def _slope_bound(params: tuple[float, ...]) -> float:
    """s (t + 2) of a hard negative for the t of a mean of cosines, at most 1. For a number of which
    nothing is known it would be so large that float16 gradients of most pairs were 0.
    """
    return 3.0 * params[0]


SPEC = replace(
    spec_of(
        CurricularFace,
        name="curricularface",
        function="fused_curricularface_loss",
        source="CurricularFace (CVPR 2020), published code",
    ),
    slope_bound=_slope_bound,
)
