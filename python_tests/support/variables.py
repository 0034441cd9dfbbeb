"""Policies that read variables of every kind, and problems of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from support.cases import Case
from support.policies import CustomProblem, custom_problem

from unitsface_kernels import policy
from unitsface_kernels.losses import custom


class Everything(policy.Pair):
    """A variable of every kind, and a threshold."""

    combine = "softplus"
    scale: policy.Number = policy.number(6.0, above=0.0)
    b: policy.Threshold
    of_column: policy.PerColumn
    of_identity: policy.PerIdentity
    of_row: policy.PerRow
    factor: policy.Scalar

    def positive(self, c):
        return self.scale * self.factor * (c - self.of_row) * self.of_column - self.b

    def negative(self, c):
        return self.scale * c * self.of_row * self.of_identity + self.factor * self.b


class OneRow(policy.Pair):
    """Terms of a row's variable alone, without a threshold."""

    margin: policy.PerRow

    def positive(self, c):
        return policy.square(1 - c + self.margin)

    def negative(self, c):
        return policy.maximum(c - self.margin, 0)


class OneColumn(policy.Pair):
    weight: policy.PerColumn

    def positive(self, c):
        return self.weight * (1 - c)

    def negative(self, c):
        return self.weight * policy.exp(c)


class OneScalar(policy.Class):
    combine = "softplus"
    scale: policy.Scalar
    b: policy.Threshold

    def positive(self, c):
        return self.scale * c - self.b

    def negative(self, c):
        return self.scale * c - self.b


class Norms(policy.Class):
    """Terms that read the row's norm and its target's cosine."""

    combine = "softplus"
    of_class: policy.PerIdentity

    def positive(self, c):
        return 6 * c * self.of_class - policy.log(self.row_norm)

    def negative(self, c):
        return 6 * c * policy.where(c > self.target_cosine, 0.2 * self.row_norm, 0.7)


class NormPairs(policy.Pair):
    def positive(self, c):
        return 1 - c * policy.log(self.row_norm)

    def negative(self, c):
        return policy.softplus(4 * c - policy.sqrt(self.row_norm))


class Distances(policy.Pair):
    """Inner products, norms of both sides, and means over pairs of either kind."""

    normalize = False
    combine = "softplus"
    b: policy.Threshold

    def positive(self, c):
        return c - 0.3 * self.row_norm * self.column_norm + self.b

    def negative(self, c):
        return c - 0.3 * self.row_norm * policy.sqrt(self.column_norm) + self.b

    def positive_weight(self):
        return 0.4 / self.positives_per_row

    def negative_weight(self):
        return 0.6 / self.negatives_per_row


class Margins(policy.Class):
    """Targets alone read variables: margins by the norm, and a scale per class."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(16.0, above=0.0)
    margin: policy.PerRow
    of_class: policy.PerColumn
    slope: policy.Scalar

    def positive(self, c):
        turned = policy.cosine_margin(c, 1.0, self.margin + self.slope * self.row_norm)
        return self.scale * self.of_class * turned

    def negative(self, c):
        return self.scale * c


class Curricular(policy.Class):
    """Negatives that read variables too, against the target's cosine."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(16.0, above=0.0)
    easy: policy.PerRow
    t: policy.Scalar

    def positive(self, c):
        return self.scale * (c - 0.1 * self.easy)

    def negative(self, c):
        hard = c > self.target_cosine
        return self.scale * policy.where(hard, c * (self.t + c), c * self.easy)


POLICIES = (Everything, OneRow, OneColumn, OneScalar, Norms, NormPairs, Margins, Curricular)


class Tempered(policy.Pair):
    """A log-sum-exp over pairs of a variable of every kind."""

    combine = "logsumexp"
    temperature: policy.Scalar
    of_column: policy.PerColumn
    of_identity: policy.PerIdentity
    of_row: policy.PerRow

    def positive(self, c):
        return (c - self.of_row) * self.of_column / self.temperature

    def negative(self, c):
        return (c * self.of_row + 0.3 * self.of_identity) / self.temperature


class Hardest(policy.Pair):
    """The same of negatives alone."""

    combine = "logsumexp"
    scale: policy.Scalar
    of_row: policy.PerRow

    def negative(self, c):
        return 6 * self.scale * c * self.of_row


class Scales(policy.Pair):
    """Two log-sum-exps of scalars, which their formula reads, too."""

    combine = "logsumexps"
    alpha: policy.Scalar
    beta: policy.Scalar
    base: policy.Number = 0.5

    def positive(self, c):
        return -4 * self.alpha * (c - self.base)

    def negative(self, c):
        return 8 * self.beta * (c - self.base)

    def finish(self, positives, negatives):
        return policy.softplus(positives) / self.alpha + policy.softplus(negatives) / self.beta


class Balanced(policy.Pair):
    """Two log-sum-exps of a variable of every kind; some are read by their formula alone."""

    combine = "logsumexps"
    scale: policy.Scalar
    balance: policy.Scalar
    of_identity: policy.PerIdentity
    of_row: policy.PerRow
    weight: policy.PerRow

    def positive(self, c):
        return -6 * self.scale * (c - self.of_identity) * self.of_row

    def negative(self, c):
        return 6 * self.scale * c * self.of_row - policy.log(self.row_norm)

    def finish(self, positives, negatives):
        return self.weight * policy.softplus(self.balance * policy.tanh(positives) + negatives)


class Shifts(policy.Class):
    """Negatives that read variables per class, and a formula of the row that reads the others."""

    combine = "logsumexps"
    scale: policy.Scalar
    of_class: policy.PerIdentity
    of_row: policy.PerRow
    excess: policy.Scalar

    def positive(self, c):
        return 8 * self.scale * c - self.of_class

    def negative(self, c):
        return 8 * self.scale * c * self.of_row + self.of_class

    def finish(self, positives, negatives):
        gap = self.excess * self.of_row + negatives - positives
        return policy.softplus(gap) + self.excess * policy.log(self.row_norm)


class Triplets(policy.Class):
    """The nearest wrong classes, with variables of the row."""

    combine = "topk"
    scale: policy.Scalar
    margin: policy.PerRow
    k: policy.Number = 3

    def triplet(self, nearest, target):
        gap = nearest - target + self.margin
        return policy.softplus(6 * self.scale * gap) / self.row_norm


#: Those that are no sums, or read what sums do not.
ROWWISE = (Tempered, Scales, Shifts, Triplets, Balanced, Hardest)


def make(
    of: type[policy.Policy],
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> CustomProblem:
    p = custom_problem(case, custom.spec(of()), {}, dtype, device)
    return replace(p, b=None if p.b is None else torch.tensor(0.5, device=device))
