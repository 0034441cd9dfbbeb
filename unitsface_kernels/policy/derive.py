"""Symbolic derivatives."""

from __future__ import annotations

from .expression import Expression, build, constant, topological
from .operations import OPERATIONS


def derivative(of: Expression, by: Expression) -> Expression:
    """d ``of`` / d ``by``, a leaf; forward over the graph, so that shared terms stay shared."""
    slopes: dict[Expression, Expression | None] = {}
    for e in topological(of):
        if e is by:
            slopes[e] = constant(1)
            continue
        terms = []
        if any(slopes[arg] is not None for arg in e.args):
            rules = OPERATIONS[e.op].derivatives(e, *e.args)
            for arg, rule in zip(e.args, rules, strict=True):
                inner = slopes[arg]
                if inner is not None and rule is not None:
                    terms.append(rule * inner)
        if terms and e.op in _CHOICES:
            # The derivative of the chosen argument, rather than a sum of masked ones.
            mask, yes, no = _CHOICES[e.op](*e.args)
            slopes[e] = build("where", mask, *(_or_zero(slopes[arg]) for arg in (yes, no)))
            continue
        slopes[e] = None
        for term in terms:
            total = slopes[e]
            slopes[e] = term if total is None else total + term
    return _or_zero(slopes[of])


def _or_zero(e: Expression | None) -> Expression:
    return constant(0) if e is None else e


#: Operations that return one of two arguments, as (mask, argument if it holds, the other).
_CHOICES = {
    "where": lambda mask, yes, no: (mask, yes, no),
    "max": lambda x, y: (x < y, y, x),
    "min": lambda x, y: (y < x, y, x),
}


def select(mask: Expression, yes: Expression, no: Expression) -> Expression:
    """``where(mask, yes, no)`` with the choice moved into equal operations.

    Two softplus of which one counts become one softplus of a chosen argument.
    """
    if yes is no:
        return yes
    if yes.op == no.op and yes.args and len(yes.args) == len(no.args):
        differing = [(x, y) for x, y in zip(yes.args, no.args, strict=True) if x is not y]
        same_masks = all(not x.mask for x, _ in differing)
        if same_masks and (len(differing) == 1 or yes.op in _COSTLY):
            args = (select(mask, x, y) for x, y in zip(yes.args, no.args, strict=True))
            return build(yes.op, *args)
    return build("where", mask, yes, no)


#: Operations of which one costs more than a selection of each of its arguments.
_COSTLY = {"pow", "margin", "margin_slope", "div"}
