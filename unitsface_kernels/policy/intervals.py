"""Intervals of expressions, as expressions of the intervals of their leaves.

``bounds.py`` has the values of numbers only, and assumes variables of up to 1e4. Expressions made
here are evaluated on the device, with the values of the variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, reduce

from .expression import Expression, build, constant, leaf, topological
from .form import kernel_form, slopes_of_cosine
from .formula import COSINE, THRESHOLD, Formula, streamed
from .operations import SMALLEST_BASE, SMALLEST_NORMAL

Pair = tuple[Expression, Expression]

#: In place of infinities, of which products with 0 are not 0.
LARGE = 1e30
_ANYTHING: Pair = (constant(-LARGE), constant(LARGE))


@cache
def ends(formula: Formula) -> dict[Expression, Pair]:
    """Leaves for the smallest and the largest value of each variable that tiles read, in their
    order, and of the threshold, if there is one, behind them. Of a scalar both are the scalar.
    """
    found: dict[Expression, Pair] = {}
    for variable in streamed(formula).values():
        own = leaf(variable.name, variable.kind)
        found[own] = (own, own) if variable.kind == "scalar" else _ends(own)
    if formula.threshold:
        found[THRESHOLD] = _ends(THRESHOLD)
    return found


def _ends(of: Expression) -> Pair:
    return leaf(f"smallest {of.payload}", of.kind), leaf(f"largest {of.payload}", of.kind)


@cache
def largest_slope(formula: Formula) -> Expression:
    """A bound of what ``bounds.slope_bound`` bounds, as a function of numbers and of :func:`ends`;
    loose where a formula takes one cosine twice, and huge where intervals know nothing.
    """
    slopes = slopes_of_cosine(kernel_form(formula))
    sizes = [_abs(interval(slope, formula))[1] for slope in slopes]
    return reduce(lambda x, y: build("max", x, y), sizes, constant(0))


def interval(root: Expression, formula: Formula) -> Pair:
    """The interval of ``root`` over all cosines, with the variables within :func:`ends`."""
    found: dict[Expression, Pair] = {}
    known: Mapping[Expression, Pair] = ends(formula)
    for e in topological(root):
        if e.uniform:
            found[e] = e, e
        elif e in known:
            found[e] = known[e]
        elif e is COSINE:
            found[e] = (constant(-1), constant(1)) if formula.normalize else _ANYTHING
        elif e.mask:
            found[e] = e, e
        else:
            found[e] = _of(e, [found[arg] for arg in e.args])
    return found[root]


def _of(e: Expression, args: list[Pair]) -> Pair:
    if e.op == "where":
        return _where(*args)
    if all(low is high for low, high in args):
        one = build(e.op, *(low for low, _ in args))
        return one, one
    rule = _RULES.get(e.op)
    return _ANYTHING if rule is None else rule(*args)


def _least(*values: Expression) -> Expression:
    return reduce(lambda x, y: x if x is y else build("min", x, y), values)


def _most(*values: Expression) -> Expression:
    return reduce(lambda x, y: x if x is y else build("max", x, y), values)


def _hull(*values: Expression) -> Pair:
    return _least(*values), _most(*values)


def _where(mask: Pair, yes: Pair, no: Pair) -> Pair:
    if mask[0].uniform:
        low, high = (build("where", mask[0], *sides) for sides in zip(yes, no, strict=True))
        return low, high
    return _least(yes[0], no[0]), _most(yes[1], no[1])


def _mul(x: Pair, y: Pair) -> Pair:
    return _hull(*dict.fromkeys(a * b for a in x for b in y))


def _div(x: Pair, y: Pair) -> Pair:
    if y[0] is y[1]:
        return _hull(x[0] / y[0], x[1] / y[0])
    low, high = _mul(x, (1 / y[1], 1 / y[0]))
    has_zero = (y[0] <= 0) & (y[1] >= 0)
    return build("where", has_zero, -LARGE, low), build("where", has_zero, LARGE, high)


def _abs(x: Pair) -> Pair:
    size = _most(build("max", x[0], -x[0]), build("max", x[1], -x[1]))
    least = _least(build("max", x[0], -x[0]), build("max", x[1], -x[1]))
    has_zero = (x[0] <= 0) & (x[1] >= 0)
    return build("where", has_zero, 0, least), size


def _rising(op: str, least: float | None = None) -> Callable[[Pair], Pair]:
    def rule(x: Pair) -> Pair:
        low, high = (build(op, end if least is None else build("max", end, least)) for end in x)
        return low, high

    return rule


def _pow(x: Pair, t: Pair) -> Pair:
    # Monotonic in either; of a base of 0 and below it is 0.
    bases = [build("max", end, SMALLEST_BASE) for end in x]
    corners = dict.fromkeys(build("pow", base, end) for base in bases for end in t)
    return constant(0), _most(*corners)


def _always(low: float, high: float) -> Callable[..., Pair]:
    return lambda *_: (constant(low), constant(high))


_RULES: dict[str, Callable[..., Pair]] = {
    "add": lambda x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": _mul,
    "div": _div,
    "neg": lambda x: (-x[1], -x[0]),
    "abs": _abs,
    "exp": _rising("exp"),
    "log": _rising("log", SMALLEST_NORMAL),
    "sqrt": _rising("sqrt", 0.0),
    "softplus": _rising("softplus"),
    "sigmoid": _rising("sigmoid"),
    "sigmoid_slope": _always(0.0, 0.25),
    "tanh": _rising("tanh"),
    "sin": _always(-1.0, 1.0),
    "cos": _always(-1.0, 1.0),
    "sine": _always(0.0, 1.0),
    "acos": lambda x: (build("acos", x[1]), build("acos", x[0])),
    "pow": _pow,
    "max": lambda x, y: (_most(x[0], y[0]), _most(x[1], y[1])),
    "min": lambda x, y: (_least(x[0], y[0]), _least(x[1], y[1])),
    "detach": lambda x: x,
}
