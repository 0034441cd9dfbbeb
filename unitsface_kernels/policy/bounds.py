"""Bounds of derivatives over all cosines, thresholds and variables."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .eager import evaluate
from .expression import Expression, topological
from .form import POSITIVE, host_values, kernel_form, slopes_of_cosine
from .formula import COSINE, Formula, number_bindings

Interval = tuple[float, float]

_EVERYTHING: Interval = (-math.inf, math.inf)
#: Bound of thresholds and variables, the same as of the samples.
_LARGEST_OTHER = 1e4


def slope_bound(formula: Formula, params: tuple[float, ...]) -> float:
    """A bound of |d value / d cosine| of terms, or of |d logit / d cosine| of negatives, and of
    positives if there is any number of them; for ``LossSpec.slope_bound``.

    By interval arithmetic; where that is loose, twice the largest of many samples. 0 for
    "topk", which has no gradient tiles. Of inner products, which no sample covers, by interval
    arithmetic alone; infinite where they have no bound.
    """
    slopes = slopes_of_cosine(kernel_form(formula))
    if not slopes:
        return 0.0
    rigorous = max(_magnitude(_interval(e, formula, params)) for e in slopes)
    if not formula.normalize:
        return rigorous or 1.0
    sampled = max(_sampled(e, formula, params) for e in slopes)
    # Interval arithmetic takes terms of one cosine as independent.
    bound = rigorous if rigorous <= 4.0 * sampled else 2.0 * sampled
    # Scales are quotients by it: where all slopes are 0, any other bound.
    return bound or 1.0


def _magnitude(interval: Interval) -> float:
    largest = max(abs(interval[0]), abs(interval[1]))
    return math.inf if math.isnan(largest) else largest


# --- samples --------------------------------------------------------------------------------------


def _sampled(e: Expression, formula: Formula, params: tuple[float, ...]) -> float:
    dense = torch.linspace(-1.0, 1.0, 2049, dtype=torch.float64)
    # Slopes of roots, as of distances, grow towards the ends.
    near_ends = 1.0 - torch.logspace(-8.0, -3.0, 512, dtype=torch.float64)
    dense = torch.cat([dense, near_ends, -near_ends])
    others = torch.tensor([0.0, *(s * 10.0**k for k in range(-1, 5) for s in (-1, 1))])
    largest = 0.0
    for positive in (True, False):
        bindings: dict[Expression, torch.Tensor | float] = {
            COSINE: dense,
            POSITIVE: torch.tensor(positive),
            **number_bindings(formula, params),
        }
        for inner in topological(e):
            if inner.op == "leaf" and inner not in bindings:
                bindings[inner] = others.double()[:, None]
        # Not where a variable is outside of what the formula is defined for.
        found = evaluate(e, bindings).abs().nan_to_num(0.0, 0.0)
        largest = max(largest, float(found.max()))
    return largest


# --- intervals ------------------------------------------------------------------------------------


def _interval(root: Expression, formula: Formula, params: tuple[float, ...]) -> Interval:
    found: dict[Expression, Interval] = {}
    # Else every slope that a variable scales would count as one that the inner product makes large.
    others = _EVERYTHING if formula.normalize else (-_LARGEST_OTHER, _LARGEST_OTHER)
    for e in topological(root):
        if e.uniform:
            (value,) = host_values((e,), formula, params)
            found[e] = value, value
        elif e is COSINE:
            found[e] = (-1.0, 1.0) if formula.normalize else _EVERYTHING
        elif e.op == "leaf":
            found[e] = (0.0, 1.0) if e.mask else others
        else:
            interval = _RULES.get(e.op, _unknown)(*(found[arg] for arg in e.args))
            # Infinities of either sign, added.
            found[e] = _EVERYTHING if any(map(math.isnan, interval)) else interval
    return found[root]


def _unknown(*_: Interval) -> Interval:
    return _EVERYTHING


def _safe(function: Callable[[float], float], x: float) -> float:
    try:
        return function(x)
    except OverflowError:
        return math.inf
    except ValueError:
        return -math.inf


def _rising(function: Callable[[float], float]) -> Callable[[Interval], Interval]:
    return lambda x: (_safe(function, x[0]), _safe(function, x[1]))


def _product(x: float, y: float) -> float:
    # 0 times anything that a finite number may be.
    return 0.0 if x == 0.0 or y == 0.0 else x * y


def _mul(x: Interval, y: Interval) -> Interval:
    corners = [_product(a, b) for a in x for b in y]
    return min(corners), max(corners)


def _div(x: Interval, y: Interval) -> Interval:
    if y[0] <= 0.0 <= y[1]:
        return _EVERYTHING
    return _mul(x, (1.0 / y[1], 1.0 / y[0]))


def _abs(x: Interval) -> Interval:
    low = 0.0 if x[0] <= 0.0 <= x[1] else min(abs(x[0]), abs(x[1]))
    return low, max(abs(x[0]), abs(x[1]))


def _where(mask: Interval, yes: Interval, no: Interval) -> Interval:
    if mask[0] == mask[1]:
        return yes if mask[0] else no
    return min(yes[0], no[0]), max(yes[1], no[1])


def _lt(x: Interval, y: Interval) -> Interval:
    return float(x[1] < y[0]), float(x[0] < y[1])


def _le(x: Interval, y: Interval) -> Interval:
    return float(x[1] <= y[0]), float(x[0] <= y[1])


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _sigmoid(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(0.5 * x)


def _pow(x: Interval, t: Interval) -> Interval:
    if t[0] < 0.0:
        return 0.0, math.inf
    bases = [max(end, 0.0) for end in x]
    corners = [_safe(lambda e, b=base: b**e, end) for base in bases for end in t]  # type: ignore
    return min(corners), max(corners)


_RULES: dict[str, Callable[..., Interval]] = {
    "add": lambda x, y: (x[0] + y[0], x[1] + y[1]),
    "sub": lambda x, y: (x[0] - y[1], x[1] - y[0]),
    "mul": _mul,
    "div": _div,
    "neg": lambda x: (-x[1], -x[0]),
    "abs": _abs,
    "exp": _rising(lambda x: math.exp(min(max(x, -87.0), 88.0))),
    "log": _rising(lambda x: math.log(max(x, 1.1754943508222875e-38))),
    "sqrt": _rising(lambda x: math.sqrt(max(x, 0.0))),
    "softplus": _rising(_softplus),
    "sigmoid": _rising(_sigmoid),
    "sigmoid_slope": lambda _: (0.0, 0.25),
    "tanh": _rising(math.tanh),
    "sin": lambda _: (-1.0, 1.0),
    "cos": lambda _: (-1.0, 1.0),
    "sine": lambda _: (0.0, 1.0),
    "acos": lambda x: (
        math.acos(min(max(x[1], -1.0), 1.0)),
        math.acos(min(max(x[0], -1.0), 1.0)),
    ),
    "pow": _pow,
    "max": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "min": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "where": _where,
    "detach": lambda x: x,
    "lt": _lt,
    "le": _le,
    "eq": lambda x, y: (0.0, _le(x, y)[1] * _le(y, x)[1]),
    "and": lambda x, y: (x[0] * y[0], x[1] * y[1]),
    "or": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "not": lambda x: (1.0 - x[1], 1.0 - x[0]),
}
