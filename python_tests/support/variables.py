"""Policies that read variables of every kind, and problems of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from support.cases import Case, build
from support.policies import CustomProblem
from torch import Tensor

from unitsface_kernels import policy
from unitsface_kernels.functional.call import Options, Samples, class_loss
from unitsface_kernels.functional.ranks import pair_loss
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
    """Negatives that read variables per class."""

    combine = "logsumexp"
    scale: policy.Scalar
    of_class: policy.PerIdentity
    of_row: policy.PerRow

    def positive(self, c):
        return 8 * self.scale * c - self.of_class

    def negative(self, c):
        return 8 * self.scale * c * self.of_row + self.of_class


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


@dataclass
class VariableProblem(CustomProblem):
    """A problem with values of variables, which are leaves like the features."""

    variables: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["variables"][name]
        except KeyError:
            raise AttributeError(name) from None

    def loss(self, backend: str, **changes: Any) -> Tensor:
        changed = {name: changes.pop(name) for name in self.variables if name in changes}
        p = replace(self, **changes)
        values, variables = {**p.spec.defaults(), **p.values}, {**p.variables, **changed}
        options = Options(p.reduction, backend, 0.0, variables)
        if p.spec.topology == "class":
            tensors = (p.rows, p.columns, p.labels, p.b, p.index)
            return class_loss(p.spec, values, *tensors, p.reduction, backend, 0.0, variables)
        samples = Samples(p.rows, p.labels, p.b, p.columns, p.column_labels, None)
        return pair_loss(p.spec, values, samples, options, None, "auto")

    def converted(self, dtype: torch.dtype) -> VariableProblem:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        variables = {name: value.detach().to(kind) for name, value in self.variables.items()}
        return replace(super().converted(dtype), variables=variables)  # type: ignore[return-value]

    def leaves(self) -> dict[str, Tensor]:
        own = {name: value.detach().requires_grad_() for name, value in self.variables.items()}
        return super().leaves() | own


def make(
    of: type[policy.Policy],
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VariableProblem:
    spec = custom.spec(of())
    p = build(case, spec, {}, dtype, device)
    generator = torch.Generator().manual_seed(77)
    columns = len(p.rows if p.columns is None else p.columns)
    identities = columns if spec.topology == "class" else max(2, case.rows // 3)
    sizes = {"scalar": 1, "row": case.rows, "column": columns, "identity": identities}
    variables = {
        v.name: 0.3 + torch.rand(sizes[v.kind], generator=generator).to(device)
        for v in spec.variables
        if v.given
    }
    return VariableProblem(
        **{**vars(p), "b": None if p.b is None else torch.tensor(0.5, device=device)},
        variables=variables,
    )
