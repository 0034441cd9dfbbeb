"""A policy's methods as expressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .expression import Expression, Line, leaf
from .parameter import Parameter, Topology
from .variable import Variable

#: How the pairs of a row combine, see :class:`definition.Policy`.
Combination = Literal["sum", "softplus", "logsumexp", "logsumexps", "topk"]


@dataclass(frozen=True, eq=False)
class Formula:
    """A policy's methods as expressions of the cosine and of its fields.

    Attributes:
        name: the class.
        line: where it is defined.
        numbers: hyper-parameters in the order of the fields.
        variables: tensors that it reads: scalars, those of rows, and those of columns or
            identities, in this order; of rows the given ones first.
        threshold: whether there is a threshold.
        positive, negative: logits or terms, None if such pairs take no part.
        weights: of positives and of negatives, for "softplus"; functions of the numbers.
        finish: of "logsumexps": the row's loss by the two log-sum-exps, :data:`SUMS`.
        triplet: of "topk": the term of one of the nearest columns, by :data:`COSINES`.
        normalize: whether :data:`COSINE` is a cosine; else it is an inner product.
        regularizer: of "logsumexp" over classes: what is added to the row's loss, by variables of
            the row and scalars.
    """

    name: str
    line: Line | None
    topology: Topology
    combine: Combination
    numbers: tuple[Parameter, ...]
    variables: tuple[Variable, ...]
    threshold: bool
    positive: Expression | None
    negative: Expression | None
    weights: tuple[Expression, Expression]
    finish: Expression | None
    triplet: Expression | None = None
    normalize: bool = True
    regularizer: Expression | None = None


#: The variable of every formula, and that of the threshold.
COSINE = leaf("cosine", "cosine")
THRESHOLD = leaf("threshold", "threshold")
#: What ``finish`` reads: the log-sum-exps of a row's positives and of its negatives.
SUMS = leaf("positives", "argument"), leaf("negatives", "argument")
#: What ``triplet`` reads: the cosines of one of the nearest wrong columns and of the target.
COSINES = leaf("nearest", "argument"), leaf("target", "argument")


def number_bindings(formula: Formula, params: tuple[float, ...]) -> dict[Expression, float]:
    """The leaves of the numbers with their values, as ``eager.evaluate`` takes them."""
    return {
        leaf(n.name, "number", n.choices): value
        for n, value in zip(formula.numbers, params, strict=True)
    }


def variable_leaves(formula: Formula) -> tuple[Expression, ...]:
    """The leaves of ``formula.variables``, in their order."""
    return tuple(leaf(variable.name, variable.kind) for variable in formula.variables)


def row_leaves(formula: Formula) -> tuple[Expression, ...]:
    """The variables that ``finish`` and ``triplet`` may read, in their order: scalars, and those of
    rows.
    """
    found = zip(variable_leaves(formula), formula.variables, strict=True)
    return tuple(each for each, variable in found if variable.side != "column")


def variable_bindings(formula: Formula, values: Sequence[Tensor]) -> dict[Expression, Tensor]:
    return dict(zip(variable_leaves(formula), values, strict=True))


def streamed(formula: Formula) -> dict[int, Variable]:
    """Variables that tiles read, by their places among all."""
    return {place: v for place, v in enumerate(formula.variables) if v.streamed}


def default_params(formula: Formula) -> tuple[float, ...]:
    """Defaults of the numbers as the floats that kernels receive."""
    return tuple(
        float(n.choices.index(str(n.default)) if n.choices else n.default) for n in formula.numbers
    )
