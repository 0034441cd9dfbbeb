"""Formulas of numbers per row rather than per pair: eager, with their symbolic derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..policy.derive import derivative
from ..policy.eager import evaluate, evaluate_all
from ..policy.expression import Expression
from ..policy.formula import COSINES, SUMS, Formula, number_bindings, row_leaves
from .spec import Finish, Triplet

_Params = tuple[float, ...]
_Value = Callable[..., Tensor]
_Slopes = Callable[..., list[Tensor]]


def finish_of(formula: Formula) -> Finish:
    """:class:`Finish` of a formula that combines by "logsumexps"."""
    assert formula.finish is not None
    return Finish(*_both(formula, formula.finish, SUMS))


def triplet_of(formula: Formula) -> Triplet:
    """:class:`Triplet` of a formula that combines by "topk".

    Its number ``k`` counts the nearest columns, 1 if it has none; a number ``hinges``, "mean" or
    "sum", selects whether their terms are averaged or added.
    """
    assert formula.triplet is not None
    names = [number.name for number in formula.numbers]

    def count(params: _Params) -> int:
        return int(params[names.index("k")]) if "k" in names else 1

    def adds(params: _Params) -> bool:
        return "hinges" in names and params[names.index("hinges")] != 0.0

    return Triplet(count, adds, *_both(formula, formula.triplet, COSINES))


#: Values of formulas, which a graph of torch.compile can only name by numbers.
_VALUES: dict[int, _Value] = {}
#: Each number is given once, also to concurrent threads.
_places = itertools.count()


def row_value(
    place: int,
    first: Tensor,
    second: Tensor,
    params: _Params,
    variables: Sequence[Tensor] = (),
) -> Tensor:
    """The value number ``place``."""
    # torch.compile with dynamic shapes makes a symbol of it.
    return _VALUES[int(place)](first, second, params, variables)


def _both(
    formula: Formula, of: Expression, leaves: tuple[Expression, Expression]
) -> tuple[_Value, _Slopes]:
    given = row_leaves(formula)

    @cache
    def by() -> list[Expression]:
        return [derivative(of, each) for each in (*leaves, *given)]

    def bindings(
        first: Tensor, second: Tensor, params: _Params, variables: Sequence[Tensor]
    ) -> dict[Expression, Tensor | float]:
        return {
            **dict(zip((*leaves, *given), (first, second, *variables), strict=True)),
            **number_bindings(formula, params),
        }

    def shaped(found: Tensor, first: Tensor, second: Tensor) -> Tensor:
        if found.shape == first.shape == second.shape and found.dtype == first.dtype:
            return found
        # A constant has no dimension, and is on the CPU. (torch.broadcast_shapes imports SymPy.)
        return found.to(first).expand_as(torch.broadcast_tensors(first, second)[0])

    def evaluated(
        first: Tensor, second: Tensor, params: _Params, variables: Sequence[Tensor]
    ) -> Tensor:
        return shaped(evaluate(of, bindings(first, second, params, variables)), first, second)

    place = next(_places)
    _VALUES[place] = evaluated

    def value(
        first: Tensor, second: Tensor, params: _Params, variables: Sequence[Tensor] = ()
    ) -> Tensor:
        if torch.compiler.is_compiling():
            from ..compiled import row_value as compiled_value

            return compiled_value(place, first, second, params, variables)
        return evaluated(first, second, params, variables)

    def slopes(
        first: Tensor, second: Tensor, params: _Params, variables: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        found = evaluate_all(by(), bindings(first, second, params, variables))
        return [shaped(slope, first, second) for slope in found]

    return value, slopes
