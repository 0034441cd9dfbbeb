"""A formula and its derivatives on tiles."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...policy.eager import evaluate_all
from ...policy.expression import Expression
from ...policy.form import POSITIVE, Slopes, kernel_form
from ...policy.formula import COSINE, THRESHOLD, Formula, number_bindings


class Terms:
    """The formula of a call, with its hyper-parameters, on float32 tensors of any shape.

    Results have the shape of the cosines; derivatives are those of the kernels, without autograd.
    """

    def __init__(self, formula: Formula, params: tuple[float, ...]) -> None:
        self._form = kernel_form(formula)
        self._numbers = number_bindings(formula, params)

    def of_pairs(self, cosine: Tensor, threshold: Tensor, positive: Tensor) -> list[Tensor]:
        """Terms of a ``sum`` loss, and their derivatives by cosine and by threshold."""
        given = {COSINE: cosine, THRESHOLD: threshold, POSITIVE: positive}
        return self._evaluated(self._form.term, given)

    def positive(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of positives, and their derivatives by cosine."""
        logit, slope, _ = self._evaluated(self._form.positive, {COSINE: cosine})
        return logit, slope

    def negative(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        logit, slope, _ = self._evaluated(self._form.negative, {COSINE: cosine})
        return logit, slope

    def _evaluated(self, slopes: Slopes | None, given: Mapping[Expression, Tensor]) -> list[Tensor]:
        assert slopes is not None
        cosine = given[COSINE]
        wanted = (slopes.value, slopes.dcosine, slopes.dthreshold)
        # The cosine first: its dtype is that of all.
        found = evaluate_all(wanted, {**given, **self._numbers})
        return [value.to(cosine.dtype).expand_as(cosine) for value in found]
