"""Users' losses for tests: one policy for each way in which pairs combine, and problems of them."""

from __future__ import annotations

import math
from typing import Any

from support.cases import Case, Problem, build
from torch import Tensor

from unitsface_kernels import policy
from unitsface_kernels.functional.call import Options, Samples, class_loss
from unitsface_kernels.functional.ranks import pair_loss
from unitsface_kernels.losses import LossSpec, custom


class Contrastive(policy.Pair):
    margin: policy.Number = 0.1

    def positive(self, c):
        return 1 - c

    def negative(self, c):
        return policy.maximum(c - self.margin, 0)


class Unified(policy.Pair):
    combine = "softplus"
    scale: policy.Number = policy.number(16.0, above=0.0)
    margin: policy.Number = 0.1
    b: policy.Threshold

    def positive(self, c):
        return self.scale * (c - self.margin) - self.b

    def negative(self, c):
        return self.scale * c - self.b


class Quadratic(policy.Class):
    """Terms, a threshold, and a positive weight."""

    scale: policy.Number = policy.number(8.0, above=0.0)
    b: policy.Threshold

    def positive(self, c):
        return policy.softplus(self.b - self.scale * policy.square(1 + c))

    def negative(self, c):
        return 0.5 * policy.softplus(self.scale * c - self.b)


class Curved(policy.Class):
    """Logits that are not linear in the cosine."""

    combine = "logsumexp"
    scale: policy.Number = policy.number(16.0, above=0.0)
    margin: policy.Number = 0.3

    def positive(self, c):
        return self.scale * (c - self.margin)

    def negative(self, c):
        return self.scale * c * (1 + 0.25 * c)


class PairSoftmax(policy.Pair):
    combine = "logsumexp"
    scale: policy.Number = policy.number(16.0, above=0.0)
    margin: policy.Number = 0.1

    def positive(self, c):
        return self.scale * (c - self.margin)

    def negative(self, c):
        return self.scale * c


class Apart(policy.Pair):
    """A row's loss by two log-sum-exps, of logits that are not linear in the cosine."""

    combine = "logsumexps"
    scale: policy.Number = policy.number(6.0, above=0.0)
    gap: policy.Number = 0.3

    def positive(self, c):
        return -self.scale * policy.acos(0.9 * c)

    def negative(self, c):
        return self.scale * c - policy.where(c < 0, 1, 0)

    def finish(self, positives, negatives):
        return policy.softplus(negatives + policy.tanh(positives) + self.gap) / self.scale


class SoftTriplet(policy.Class):
    """The nearest wrong classes, with a slope that depends on both cosines."""

    combine = "topk"
    scale: policy.Number = policy.number(5.0, above=0.0)
    k: policy.Number = 3

    def triplet(self, nearest, target):
        return policy.softplus(self.scale * (nearest - policy.square(target)))


class Hard(policy.Class):
    """Easy negatives are left out: of some rows, and of some tiles of others, all of them."""

    combine = "logsumexp"
    low: policy.Number = 0.1

    def positive(self, c):
        return 8 * c

    def negative(self, c):
        return policy.where(c > self.low, 8 * c, -math.inf)


POLICIES = (
    *(Contrastive(), Unified(), Quadratic(), Curved(), PairSoftmax()),
    *(Apart(), SoftTriplet()),
)
#: Names of :func:`specs`: one for each driver.
DRIVERS = ("Contrastive", "Quadratic per column", "Curved", "PairSoftmax", "Apart")


def specs() -> dict[str, LossSpec]:
    """Every loss of :data:`POLICIES`, those with a threshold also with one per column."""
    found = {}
    for instance in POLICIES:
        spec = custom.spec(instance)
        found[type(instance).__name__] = spec
        if spec.threshold != "none":
            found[f"{type(instance).__name__} per column"] = custom.per_column(spec)
    return found


class CustomProblem(Problem):
    """A problem of a loss that has no public function of its own."""

    def loss(self, backend: str, **changes: Any) -> Tensor:
        p = self.changed(**changes)
        values = {**p.spec.defaults(), **p.values}
        options = Options(p.reduction, backend, 0.0, p.variables)
        if p.spec.topology == "class":
            tensors = (p.rows, p.columns, p.labels, p.b, p.index)
            return class_loss(p.spec, values, *tensors, *options)
        samples = Samples(p.rows, p.labels, p.b, p.columns, p.column_labels, None)
        return pair_loss(p.spec, values, samples, options, None, "auto")


def custom_problem(case: Case, spec: LossSpec, *arguments: Any) -> CustomProblem:
    """As ``cases.build``."""
    return CustomProblem(**vars(build(case, spec, *arguments)))
