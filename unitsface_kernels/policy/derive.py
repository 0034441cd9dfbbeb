"""Symbolic derivatives."""

from __future__ import annotations

from collections.abc import Callable

from .expression import Expression, build, constant, made_by, topological
from .operations import OPERATIONS


def derivative(of: Expression, by: Expression) -> Expression:
    """d ``of`` / d ``by``, a leaf; forward over the graph, so that shared terms stay shared."""
    slopes: dict[Expression, Expression | None] = {}
    for e in topological(of):
        if e is by:
            slopes[e] = constant(1)
        elif any(slopes[arg] is not None for arg in e.args):
            with made_by(e):
                slopes[e] = _chain(e, slopes)
        else:
            slopes[e] = None
    return _or_zero(slopes[of])


def _chain(e: Expression, slopes: dict[Expression, Expression | None]) -> Expression | None:
    if e.op in _CHOICES:
        # The derivative of the chosen argument, rather than a sum of masked ones.
        mask, yes, no = _CHOICES[e.op](*e.args)
        return build("where", mask, *(_or_zero(slopes[arg]) for arg in (yes, no)))
    total = None
    rules = OPERATIONS[e.op].derivatives(e, *e.args)
    for arg, rule in zip(e.args, rules, strict=True):
        inner = slopes[arg]
        if inner is not None and rule is not None:
            term = rule * inner
            total = term if total is None else total + term
    return total


def _or_zero(e: Expression | None) -> Expression:
    return constant(0) if e is None else e


#: Operations that return one of two arguments, as (mask, argument if it holds, the other).
_CHOICES: dict[str, Callable[..., tuple[Expression, Expression, Expression]]] = {
    "where": lambda mask, yes, no: (mask, yes, no),
    "max": lambda x, y: (x < y, y, x),
    "min": lambda x, y: (y < x, y, x),
}
