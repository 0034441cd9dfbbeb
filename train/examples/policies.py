"""The losses of docs/custom_losses.md.

``loss.pair=train.examples.policies:Contrastive`` trains with one of them; a file of your own in the
current directory is named in the same way.
"""

from __future__ import annotations

from unitsface_kernels import policy


class Contrastive(policy.Pair):
    """Contrastive loss on cosines: positives are drawn to 1, negatives pushed below the margin.

    Hadsell, Chopra and LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR
    2006, eq. 4, with 1 - c for the squared distance.
    """

    margin: policy.Number = 0.4

    def positive(self, c):
        return 1 - c

    def negative(self, c):
        return policy.maximum(c - self.margin, 0)


class Verification(policy.Pair):
    """Logistic loss of the decision "same identity" at a learnable threshold."""

    combine = "softplus"
    scale: policy.Number = policy.number(32.0, above=0.0)
    balance: policy.Number = policy.number(0.5, at_least=0.0, maximum=1.0)
    threshold: policy.Threshold

    def positive(self, c):
        return self.scale * c - self.threshold

    def negative(self, c):
        return self.scale * c - self.threshold

    def positive_weight(self):
        return self.balance

    def negative_weight(self):
        return 1 - self.balance


class ClassMargin(policy.Class):
    """CosFace with a margin of its own for every class, which may be learned."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.PerIdentity = 0.4

    def positive(self, c):
        return self.scale * (c - self.margin)

    def negative(self, c):
        return self.scale * c


class Circle(policy.Pair):
    """Circle loss.

    Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020,
    eq. 6, with the weights of eq. 5 as constants of the gradient.
    """

    combine = "logsumexps"
    scale: policy.Number = policy.number(64.0, above=0.0)
    margin: policy.Number = 0.25

    def positive(self, c):
        weight = policy.maximum(1 + self.margin - policy.detach(c), 0)
        return -self.scale * weight * (c - (1 - self.margin))

    def negative(self, c):
        weight = policy.maximum(policy.detach(c) + self.margin, 0)
        return self.scale * weight * (c - self.margin)

    def finish(self, positives, negatives):
        return policy.softplus(positives + negatives)


class AdaptiveMargin(policy.Class):
    """CosFace whose margin grows with the target's cosine, taken as a constant (EPL's form)."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(64.0, above=0.0)
    growth: policy.Number = policy.number(0.5, at_least=0.0)

    def positive(self, c):
        return self.scale * (c - self.growth * policy.detach(c))

    def negative(self, c):
        return self.scale * c
