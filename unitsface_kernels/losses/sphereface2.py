"""SphereFace2: binary classification on the sphere, with an additive or an angular margin."""

from __future__ import annotations

import math

from .. import policy
from .from_policy import spec_of


class SphereFace2(policy.Class):
    combine = "softplus"
    scale: policy.Number = policy.number(40.0, above=0.0)
    margin: policy.Number = policy.number(0.4, at_least=0.0, maximum=math.pi)
    t: policy.Number = policy.number(3.0, above=0.0)
    alpha: policy.Number = policy.number(0.7, above=0.0, maximum=1.0)
    loss_weight: policy.Number = policy.number(50.0, above=0.0)
    margin_type: policy.Number = policy.number("C", choices=("C", "A"))
    margin_gradient: policy.Number = policy.number("detached", choices=("detached", "exact"))
    b: policy.Threshold

    def positive(self, c):
        angle, shift = self._margins()
        cosine, sine = policy.cos(angle), policy.sin(angle)
        # cos(theta + angle), -1 once the sum passes pi.
        moved = policy.where(c < -cosine, -1.0, c * cosine - policy.sine(c) * sine)
        return self.scale * (self._adjusted(c, moved) - shift) + self.b

    def negative(self, c):
        _, shift = self._margins()
        return self.scale * (self._adjusted(c, c) + shift) + self.b

    def _margins(self):
        """What is added to the angle, and what is taken from the adjusted cosine."""
        angular = self.margin_type == "A"
        return policy.where(angular, self.margin, 0.0), policy.where(angular, 0.0, self.margin)

    def _adjusted(self, c, moved):
        adjusted = 2.0 * policy.pow((moved + 1.0) / 2.0, self.t) - 1.0
        detached = c + policy.detach(adjusted - c)
        return policy.where(self.margin_gradient == "exact", adjusted, detached)

    def positive_weight(self):
        return self.loss_weight / self.scale * self.alpha

    def negative_weight(self):
        return self.loss_weight / self.scale * (1.0 - self.alpha)


SPEC = spec_of(
    SphereFace2,
    name="sphereface2",
    function="fused_sphereface2_loss",
    source="SphereFace2 (ICLR 2022), with the additive (C) and the angular (A) margin",
)
