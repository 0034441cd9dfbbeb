"""Losses outside the registry, for the code generation tests: one for every kind of kernel."""

from __future__ import annotations

from unitsface_kernels import policy


class Contrastive(policy.Pair):
    """Terms without a threshold."""

    margin: policy.Number = 0.4

    def positive(self, c):
        return 1 - c

    def negative(self, c):
        return policy.maximum(c - self.margin, 0)


class Soft(policy.Pair):
    """Terms with a threshold and functions of their own."""

    scale: policy.Number = policy.number(16.0, above=0.0)
    b: policy.Threshold

    def positive(self, c):
        return policy.softplus(self.b - self.scale * policy.square(1 + c))

    def negative(self, c):
        return 0.5 * policy.softplus(self.scale * policy.tanh(2 * c) - self.b)


class Angular(policy.Class):
    """Logits with angles and a weight."""

    combine = "softplus"
    scale: policy.Number = policy.number(32.0, above=0.0)
    margin: policy.Number = policy.number(0.3, at_least=0.0)
    b: policy.Threshold

    def positive(self, c):
        return self.scale * policy.cosine_margin(c, 1.0, self.margin) - self.b

    def negative(self, c):
        return self.scale * c - self.b

    def negative_weight(self):
        return 0.25


class Curved(policy.Class):
    """A negative's logit that is not linear in the cosine."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(32.0, above=0.0)
    margin: policy.Number = 0.3

    def positive(self, c):
        return self.scale * (c - self.margin)

    def negative(self, c):
        return self.scale * c * (1 + 0.25 * c)


class Sharpened(policy.Pair):
    """Log-sum-exp over positives whose logit differs from that of the negatives."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(32.0, above=0.0)

    def positive(self, c):
        return self.scale * (c - 0.5 * policy.square(1 - c))

    def negative(self, c):
        return self.scale * (c + policy.exp(4 * (c - 1)))


POLICIES = (Contrastive, Soft, Angular, Curved, Sharpened)
