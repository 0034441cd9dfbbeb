"""A formula and its derivatives on tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...policy.eager import evaluate_all
from ...policy.expression import Expression
from ...policy.form import POSITIVE, Slopes, kernel_form
from ...policy.formula import COSINE, THRESHOLD, Formula, number_bindings, variable_leaves


@dataclass(frozen=True, eq=False)
class Logits:
    """Logits of pairs, and their derivatives by cosine and by each variable that tiles read."""

    value: Tensor
    slope: Tensor
    by_variables: list[Tensor]


class Terms:
    """The formula of a call, with its hyper-parameters, on float32 tensors of any shape.

    Results have the shape of the cosines; derivatives are those of the kernels, without autograd.
    """

    def __init__(self, formula: Formula, params: tuple[float, ...]) -> None:
        self._form = kernel_form(formula)
        self._numbers = number_bindings(formula, params)
        leaves = zip(variable_leaves(formula), formula.variables, strict=True)
        # Of what tiles read: places among all variables.
        self._streamed = {leaf: i for i, (leaf, v) in enumerate(leaves) if v.streamed}

    def of_pairs(
        self, cosine: Tensor, threshold: Tensor, positive: Tensor, variables: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Terms of a ``sum`` loss, and their derivatives by cosine, threshold and variables."""
        given = {COSINE: cosine, THRESHOLD: threshold, POSITIVE: positive}
        return self._evaluated(self._form.term, given, variables)

    def positive(self, cosine: Tensor, variables: Sequence[Tensor] = ()) -> Logits:
        return self._logits(self._form.positive, cosine, variables)

    def negative(self, cosine: Tensor, variables: Sequence[Tensor] = ()) -> Logits:
        return self._logits(self._form.negative, cosine, variables)

    def _logits(self, slopes: Slopes | None, cosine: Tensor, variables: Sequence[Tensor]) -> Logits:
        found = self._evaluated(slopes, {COSINE: cosine}, variables)
        return Logits(found[0], found[1], found[3:])

    def _evaluated(
        self,
        slopes: Slopes | None,
        given: Mapping[Expression, Tensor],
        variables: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        assert slopes is not None
        cosine = given[COSINE]
        by_variables = [slopes.dvariables[i] for i in self._streamed.values()] if variables else []
        wanted = (slopes.value, slopes.dcosine, slopes.dthreshold, *by_variables)
        values = dict(zip(self._streamed, variables, strict=True)) if variables else {}
        # The cosine first: its dtype is that of all.
        found = evaluate_all(wanted, {**given, **values, **self._numbers})
        # What numbers alone decide is on the host.
        on_device = (v.to(cosine) if v.dim() else cosine.new_full((), float(v)) for v in found)
        return [value.expand_as(cosine) for value in on_device]
