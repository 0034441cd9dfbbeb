"""The specification of a loss from its policy."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from itertools import count

import torch
from torch import Tensor

from ..policy import bounds, eager
from ..policy.definition import Policy
from ..policy.expression import Expression, build
from ..policy.formula import COSINE, THRESHOLD, Formula, number_bindings, variable_bindings
from .row_formulas import finish_of, triplet_of
from .spec import EagerTerm, LossSpec, Reduction, ValidRows

_REDUCTIONS: dict[str, Reduction] = {
    "sum": "sum",
    "softplus": "sum",
    "logsumexp": "logsumexp",
    "logsumexps": "logsumexps",
    "topk": "nearest",
}


def spec_of(
    policy: type[Policy],
    *,
    name: str,
    function: str,
    source: str,
    valid_rows: ValidRows = "labeled",
    tiles: LossSpec | None = None,
) -> LossSpec:
    """The loss ``name`` that a policy defines; arguments as the fields of :class:`LossSpec`."""
    made = of_formula(
        policy.formula, name=name, function=function, source=source, valid_rows=valid_rows
    )
    return made if tiles is None else replace(made, tiles=tiles)


def of_formula(
    formula: Formula,
    *,
    name: str,
    function: str,
    source: str,
    valid_rows: ValidRows,
) -> LossSpec:
    """The loss ``name`` of a formula."""
    reduction = _REDUCTIONS[formula.combine]
    if (formula.topology, reduction) == ("class", "logsumexps"):
        # The same passes, whatever is made of a row's target and its negatives.
        reduction = "logsumexp"
    return LossSpec(
        name=name,
        topology=formula.topology,
        reduction=reduction,
        threshold="scalar" if formula.threshold else "none",
        parameters=formula.numbers,
        negative=_term(formula, _side(formula, positive=False)),
        positive=_term(formula, _side(formula, positive=True)),
        regularizer=_term(formula, formula.regularizer),
        function=function,
        source=source,
        valid_rows=valid_rows,
        # Called for every tile.
        slope_bound=lru_cache(partial(bounds.slope_bound, formula)),
        triplet=None if formula.triplet is None else triplet_of(formula),
        finish=None if formula.finish is None else finish_of(formula),
        formula=formula,
    )


def _side(formula: Formula, positive: bool) -> Expression | None:
    """The term, or the logit, of positive or of negative pairs."""
    expression = formula.positive if positive else formula.negative
    if expression is None or formula.combine != "softplus":
        return expression
    logit = -expression if positive else expression
    return formula.weights[0 if positive else 1] * build("softplus", logit)


def _term(formula: Formula, expression: Expression | None) -> EagerTerm | None:
    """The eager meaning of an expression."""
    if expression is None:
        return None
    place = next(_places)
    _TERMS[place] = formula, expression
    return partial(_term_of, place)


#: Formulas and expressions of terms, which a graph of torch.compile can only name by numbers.
_TERMS: dict[int, tuple[Formula, Expression]] = {}
#: Each number is given once, also to concurrent threads.
_places = count()


def _term_of(
    place: int,
    cosine: Tensor,
    threshold: Tensor | None,
    params: tuple[float, ...],
    variables: tuple[Tensor, ...] = (),
) -> Tensor:
    if torch.compiler.is_compiling():
        from ..compiled import evaluate_term

        return evaluate_term(place, cosine, threshold, params, variables)
    return evaluate(place, cosine, threshold, params, variables)


def evaluate(
    place: int,
    cosine: Tensor,
    threshold: Tensor | None,
    params: tuple[float, ...],
    variables: tuple[Tensor, ...],
) -> Tensor:
    """The term number ``place`` by operations of Torch."""
    # torch.compile with dynamic shapes makes a symbol of it.
    formula, expression = _TERMS[int(place)]
    bindings: dict[Expression, Tensor | float] = {
        COSINE: cosine,
        **variable_bindings(formula, variables),
    }
    if threshold is not None:
        bindings[THRESHOLD] = threshold
    return eager.evaluate(expression, bindings | number_bindings(formula, params))
