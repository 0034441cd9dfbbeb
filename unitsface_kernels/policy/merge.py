"""One expression for positives and negatives, which costs less than both and a selection."""

from __future__ import annotations

from collections.abc import Iterator

from .expression import Expression, build, topological
from .normal import ONE, negative_sign

#: Relative costs of what is not one instruction.
_COSTS = {
    "div": 5,
    "sqrt": 6,
    "sine": 8,
    "exp": 12,
    "log": 14,
    "tanh": 22,
    "sigmoid": 16,
    "sigmoid_slope": 18,
    "softplus": 26,
    "sin": 16,
    "cos": 16,
    "acos": 16,
    "pow": 28,
    "margin": 60,
    "margin_slope": 60,
}
#: Operations that one function computes at once from equal arguments.
_TWINS = {
    "sigmoid": "softplus",
    "sigmoid_slope": "softplus",
    "cos": "sin",
    "margin_slope": "margin",
}
_SUMS = {"add", "sub"}


def cost(*roots: Expression) -> int:
    """Cost of what is computed for every pair; shared terms count once."""
    seen: dict[tuple[object, ...], int] = {}
    for e in topological(*roots):
        if e.pairwise and e.args:
            key = (_TWINS.get(e.op, e.op), *map(id, e.args))
            seen[key] = max(seen.get(key, 0), _COSTS.get(e.op, 1))
    return sum(seen.values())


class Merger:
    """Caches its choices, so that what values and derivatives share stays shared."""

    def __init__(self, mask: Expression) -> None:
        self._mask = mask
        # The expressions are kept with their identities.
        self._found: dict[tuple[int, int], tuple[Expression, ...]] = {}

    def __call__(self, yes: Expression, no: Expression) -> Expression:
        """``where(mask, yes, no)``, with the selection where it is cheapest.

        Two softplus of which one counts become one softplus of a selected argument.
        """
        if yes is no:
            return yes
        key = id(yes), id(no)
        if key not in self._found:
            self._found[key] = min(self._candidates(yes, no), key=cost), yes, no
        return self._found[key][0]

    def _candidates(self, yes: Expression, no: Expression) -> Iterator[Expression]:
        yield build("where", self._mask, yes, no)
        if yes.op in _SUMS and no.op in _SUMS:
            if yes.op == no.op:
                # The first of equal costs, so that a difference stays a difference.
                yield from self._inside(yes.op, yes.args, no.args)
            (a, b), (x, y) = _summands(yes), _summands(no)
            yield build("add", self(a, x), self(b, y))
            yield build("add", self(a, y), self(b, x))
        elif yes.op == no.op and yes.args:
            yield from self._inside(yes.op, yes.args, no.args)
            if yes.op == "mul":
                yield from self._inside(yes.op, yes.args, no.args[::-1])
            return
        if yes.pairwise and no.pairwise:
            # A factor that only one of them has is 1 in the other.
            for a, b in _orders(yes):
                if a.op == no.op and a.args:
                    yield build("mul", self(a, no), self(b, ONE))
            for a, b in _orders(no):
                if a.op == yes.op and a.args:
                    yield build("mul", self(yes, a), self(ONE, b))
            (k, x), (m, y) = _factor(yes), _factor(no)
            if x is not yes or y is not no:
                yield build("mul", self(k, m), self(x, y))

    def _inside(
        self, op: str, args: tuple[Expression, ...], others: tuple[Expression, ...]
    ) -> Iterator[Expression]:
        if not any(x.mask and x is not y for x, y in zip(args, others, strict=True)):
            yield build(op, *map(self, args, others))


def _summands(e: Expression) -> tuple[Expression, Expression]:
    x, y = e.args
    return x, y if e.op == "add" else -y


def _orders(e: Expression) -> list[tuple[Expression, Expression]]:
    return [(e.args[0], e.args[1]), (e.args[1], e.args[0])] if e.op == "mul" else []


def _factor(e: Expression) -> tuple[Expression, Expression]:
    """A uniform factor, and the rest."""
    inner, minus = negative_sign(e)
    factor = ONE
    if inner.op == "mul" and any(arg.uniform for arg in inner.args):
        factor, inner = inner.args if inner.args[0].uniform else inner.args[::-1]
    return (build("neg", factor) if minus else factor), inner
