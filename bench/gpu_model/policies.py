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


class Varied(policy.Pair):
    """A variable of every kind, and a threshold: the two directions of a pair differ."""

    combine = "softplus"
    b: policy.Threshold
    scale: policy.Scalar
    of_row: policy.PerRow
    of_column: policy.PerColumn

    def positive(self, c):
        return self.scale * (c - self.of_row) - self.b * self.of_column

    def negative(self, c):
        return self.scale * c * self.of_column - self.b


class Scaled(policy.Class):
    """Logits of classes with a learnable scale."""

    combine = "logsumexp"
    scale: policy.Scalar
    margin: policy.Number = 0.3

    def positive(self, c):
        return self.scale * (c - self.margin)

    def negative(self, c):
        return self.scale * c


class Adaptive(policy.Class):
    """Negatives that read a variable of every kind."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(32.0, above=0.0)
    t: policy.Scalar
    of_class: policy.PerIdentity

    def positive(self, c):
        return self.scale * (c - 0.1 * self.row_norm)

    def negative(self, c):
        hard = policy.where(c > self.target_cosine, c * (self.t + c), c)
        return self.scale * hard + self.of_class


class Tempered(policy.Pair):
    """A log-sum-exp over pairs that reads a variable of every kind."""

    combine = "logsumexp"
    temperature: policy.Scalar
    of_row: policy.PerRow
    of_column: policy.PerColumn

    def positive(self, c):
        return (c - self.of_row) * self.of_column / self.temperature

    def negative(self, c):
        return c * self.of_row / self.temperature + self.of_column


class Opposed(policy.Pair):
    """Two log-sum-exps that do."""

    combine = "logsumexps"
    scale: policy.Scalar
    of_row: policy.PerRow
    of_column: policy.PerColumn

    def positive(self, c):
        return self.scale * (self.of_column - c)

    def negative(self, c):
        return self.scale * c * self.of_row + self.of_column

    def finish(self, positives, negatives):
        return policy.softplus(positives + negatives)


POLICIES = (
    *(Contrastive, Soft, Angular, Curved, Sharpened),
    *(Varied, Scaled, Adaptive, Tempered, Opposed),
)
