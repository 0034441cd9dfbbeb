"""Simplifications made when a node is built, so that derivatives have no superfluous terms."""

from __future__ import annotations

from collections.abc import Callable

from . import operations
from .expression import Expression, is_const, lift, node, value_of


def simplified(op: str, args: tuple[Expression, ...], mask: bool) -> Expression:
    """The node of ``op``, or a simpler one that is equal for all finite values."""
    if op != "detach" and all(is_const(arg) for arg in args):
        values = [arg.payload if arg.mask else value_of(arg) for arg in args]
        return lift(operations.OPERATIONS[op].host(*values))
    rule = _RULES.get(op)
    found = None if rule is None else rule(*args)
    return node(op, args, mask=mask) if found is None else found


def _add(x: Expression, y: Expression) -> Expression | None:
    if is_const(x, 0.0):
        return y
    if is_const(y, 0.0):
        return x
    if y.op == "neg":
        return x - y.args[0]
    if x.op == "neg":
        return y - x.args[0]
    return None


def _sub(x: Expression, y: Expression) -> Expression | None:
    if is_const(y, 0.0):
        return x
    if is_const(x, 0.0):
        return -y
    if y.op == "neg":
        return x + y.args[0]
    return None


def _mul(x: Expression, y: Expression) -> Expression | None:
    for one, other in ((x, y), (y, x)):
        if is_const(one, 0.0):
            return one
        if is_const(one, 1.0):
            return other
        if is_const(one, -1.0):
            return -other
        if one.op == "neg":
            return -(one.args[0] * other)
        # A factor of 0 or 1 selects: c * where(mask, 1, 0) is where(mask, c, 0).
        if one.op == "where" and all(_is_unit(arg) for arg in one.args[1:]):
            mask, yes, no = one.args
            return _choose(mask, other * yes, other * no)
    return None


def _is_unit(e: Expression) -> bool:
    return is_const(e) and value_of(e) in (-1.0, 0.0, 1.0)


def _choose(mask: Expression, yes: Expression, no: Expression) -> Expression:
    return simplified("where", (mask, yes, no), mask=False)


def _div(x: Expression, y: Expression) -> Expression | None:
    if is_const(y, 1.0):
        return x
    if is_const(x, 0.0):
        return x
    if x.op == "neg":
        return -(x.args[0] / y)
    return None


def _neg(x: Expression) -> Expression | None:
    if x.op == "neg":
        return x.args[0]
    if x.op == "sub":
        return x.args[1] - x.args[0]
    return None


def _where(mask: Expression, yes: Expression, no: Expression) -> Expression | None:
    if yes is no:
        return yes
    if is_const(mask):
        return yes if mask.payload else no
    if mask.op == "not":
        return _choose(mask.args[0], no, yes)
    if yes.op == "where" and yes.args[0] is mask:
        return _choose(mask, yes.args[1], no)
    if no.op == "where" and no.args[0] is mask:
        return _choose(mask, yes, no.args[2])
    return None


def _detach(x: Expression) -> Expression | None:
    return x if is_const(x) or x.op == "detach" else None


def _and(x: Expression, y: Expression) -> Expression | None:
    for one, other in ((x, y), (y, x)):
        if is_const(one):
            return other if one.payload else one
    return None


def _or(x: Expression, y: Expression) -> Expression | None:
    for one, other in ((x, y), (y, x)):
        if is_const(one):
            return one if one.payload else other
    return None


def _not(x: Expression) -> Expression | None:
    return x.args[0] if x.op == "not" else None


_RULES: dict[str, Callable[..., Expression | None]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "where": _where,
    "detach": _detach,
    "and": _and,
    "or": _or,
    "not": _not,
}
