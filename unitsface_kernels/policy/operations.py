"""The operations of formulas: eager meaning, derivative, and spelling in C++ and in Triton.

One row per operation: everything that a new one needs stands here, and its scalar functions in
``csrc/include/unitsface/scalar_math.h`` and ``backends/triton/losses/math.py``.

At a kink the derivative is that of one side, the same in every backend: the eager meaning is
written so that autograd takes it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .expression import Expression, build, constant, is_const

#: Where the sine of an angle would make a derivative infinite, it is at least this.
SMALLEST_SINE = 1e-4
#: Powers are those of bases at least this.
SMALLEST_BASE = 1e-30
#: Exponents beyond count as these: results neither under- nor overflow in float32.
EXPONENTS = (-87.0, 88.0)
#: Logarithms of anything smaller, 0 included, are that of the smallest normal float32.
SMALLEST_NORMAL = 1.1754943508222875e-38

#: d of an expression by each of its arguments, given the node and the arguments; None: 0.
Rule = Callable[..., tuple["Expression | None", ...]]


@dataclass(frozen=True)
class Operation:
    """An operation on numbers and masks.

    Attributes:
        arity: number of arguments.
        eager: its meaning on tensors; autograd differentiates it.
        host: its meaning on float64 numbers of Python.
        derivatives: by each argument.
        cpp, triton: spelling, with ``{0}``, ``{1}``, ... for the arguments.
        gives_mask: whether the result is a mask.
        mask_arguments: places of arguments that are masks.
    """

    arity: int
    eager: Callable[..., Tensor]
    host: Callable[..., float]
    derivatives: Rule
    cpp: str
    triton: str
    gives_mask: bool = False
    mask_arguments: tuple[int, ...] = ()

    def masks(self, count: int) -> tuple[bool, ...]:
        assert count == self.arity
        return tuple(place in self.mask_arguments for place in range(count))


def _none(y: Expression, *args: Expression) -> tuple[None, ...]:
    return (None,) * len(args)


def _one(rule: Callable[[Expression, Expression], Expression]) -> Rule:
    return lambda y, x: (rule(y, x),)


# --- eager meanings -------------------------------------------------------------------------------


def _exp(x: Tensor) -> Tensor:
    # The value is that of a clamped x, the derivative is the value everywhere.
    clamped = x.clamp(*EXPONENTS)
    beyond = (x - clamped).detach()
    return torch.exp(torch.where(beyond.isinf(), clamped, x - beyond))


def _log(x: Tensor) -> Tensor:
    # The derivative is 1 / max(x, the smallest), as in kernels, rather than 0 below it.
    missing = torch.where(x < SMALLEST_NORMAL, SMALLEST_NORMAL - x, 0.0).detach()
    return torch.where(x < 0.0, torch.nan, torch.log(x + missing))


def _sine(c: Tensor) -> Tensor:
    """Value sqrt((1 - c)(1 + c)), with the derivative -c / max(sine, 1e-4)."""
    square = (1.0 - c) * (1.0 + c)
    if not (c.requires_grad and torch.is_grad_enabled()):
        return torch.sqrt(square.clamp_min(0.0))
    above = square > SMALLEST_SINE**2
    bent = torch.sqrt(square.detach().clamp_min(0.0)) - (c * c - (c * c).detach()) / (
        2.0 * SMALLEST_SINE
    )
    return torch.where(above, torch.sqrt(torch.where(above, square, 1.0)), bent)


def _acos(c: Tensor) -> Tensor:
    """Angle of c clipped to [-1, 1], with the derivative -1 / max(sine, 1e-4)."""
    angle = torch.acos(c.detach().clamp(-1.0, 1.0))
    if not (c.requires_grad and torch.is_grad_enabled()):
        return angle
    sine = _sine(c)
    # Not the derivative of torch.acos, which is less accurate where 1 - c is small.
    slope = torch.where(sine > SMALLEST_SINE, torch.atan2(sine, c), c / -SMALLEST_SINE)
    return angle + (slope - slope.detach())


def _pow(x: Tensor, t: Tensor) -> Tensor:
    above = x > SMALLEST_BASE
    power = torch.pow(torch.where(above, x, torch.where(x != x, x, SMALLEST_BASE)), t)
    return torch.where(x <= 0.0, 0.0, power)


def _turned(c: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
    angle = m1 * _acos(c) + m2
    k = torch.floor(angle.detach() / math.pi)
    return (1.0 - 2.0 * torch.remainder(k, 2.0)) * torch.cos(angle) - 2.0 * k


def _margin(c: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
    value = _turned(c, m1, m2)
    exact = c
    if m1.requires_grad or m2.requires_grad:
        # Plain cosines as they are, with the derivatives by the margins.
        exact = c + (value - _turned(c, m1.detach(), m2.detach()))
    return torch.where((m1 == 1.0) & (m2 == 0.0), exact, value)


def _margin_slope(c: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
    angle = m1 * _acos(c) + m2
    sign = 1.0 - 2.0 * torch.remainder(torch.floor(angle.detach() / math.pi), 2.0)
    sine = _sine(c.clamp(-1.0, 1.0)).clamp_min(SMALLEST_SINE)
    slope = sign * torch.sin(angle) * m1 / sine
    return torch.where((m1 == 1.0) & (m2 == 0.0), 1.0, slope)


# --- host meanings --------------------------------------------------------------------------------


def _guarded(function: Callable[..., float]) -> Callable[..., float]:
    """``function`` with the results of IEEE arithmetic where Python raises."""

    def run(*values: float) -> float:
        try:
            return function(*values)
        except (ValueError, ZeroDivisionError):
            return math.nan
        except OverflowError:
            return math.inf

    return run


def _host_div(x: float, y: float) -> float:
    if y == 0.0:
        return math.nan if x == 0.0 or x != x else math.copysign(math.inf, x * math.copysign(1, y))
    return x / y


def _host_softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _host_sigmoid(x: float) -> float:
    e = math.exp(-abs(x))
    return 1.0 / (1.0 + e) if x > 0.0 else e / (1.0 + e)


def _on_host(function: Callable[..., Tensor]) -> Callable[..., float]:
    return lambda *values: float(function(*(torch.tensor(v, dtype=torch.float64) for v in values)))


def _unary(
    eager: Callable[..., Tensor],
    host: Callable[..., float],
    rule: Callable[[Expression, Expression], Expression],
    cpp: str,
    triton: str | None = None,
) -> Operation:
    return Operation(1, eager, _guarded(host), _one(rule), cpp, triton or cpp)


def _bounded_sine(c: Expression) -> Expression:
    return build("max", build("sine", c), constant(SMALLEST_SINE))


def _pow_rule(y: Expression, x: Expression, t: Expression) -> tuple[Expression | None, ...]:
    base = build("max", x, constant(SMALLEST_BASE))
    by_t = None if is_const(t) else y * build("log", base)
    return t * y / base, by_t


def _margin_rule(
    y: Expression, c: Expression, m1: Expression, m2: Expression
) -> tuple[Expression | None, ...]:
    slope = build("margin_slope", c, m1, m2)
    by_m2 = -(slope * _bounded_sine(c) / m1)
    return slope, by_m2 * build("acos", c), by_m2


def _compare(cpp: str, compare: Callable[..., bool], eager: Callable[..., Tensor]) -> Operation:
    return Operation(2, eager, compare, _none, cpp, cpp, gives_mask=True)


#: NaN: comparisons are false, and each `where` below is written so that NaN of the first survives.
OPERATIONS: dict[str, Operation] = {
    "add": Operation(
        2, torch.add, lambda x, y: x + y, lambda _, x, y: (constant(1), constant(1)),
        "{0} + {1}", "{0} + {1}",
    ),
    "sub": Operation(
        2, torch.sub, lambda x, y: x - y, lambda _, x, y: (constant(1), constant(-1)),
        "{0} - {1}", "{0} - {1}",
    ),
    "mul": Operation(
        2, torch.mul, lambda x, y: x * y, lambda _, x, y: (y, x), "{0} * {1}", "{0} * {1}"
    ),
    "div": Operation(
        2, torch.div, _host_div, lambda z, x, y: (1 / y, -z / y), "{0} / {1}", "{0} / {1}"
    ),
    "neg": _unary(torch.neg, lambda x: -x, lambda y, x: constant(-1), "-{0}"),
    "abs": _unary(
        lambda x: torch.where(x < 0.0, -x, x), abs,
        lambda y, x: build("where", x < 0, constant(-1), constant(1)), "fabsf({0})", "tl.abs({0})",
    ),
    "exp": _unary(
        _exp, lambda x: math.exp(min(max(x, EXPONENTS[0]), EXPONENTS[1])), lambda y, x: y,
        "exp_clamped({0})", "exp({0})",
    ),
    "log": _unary(
        _log, lambda x: math.log(max(x, SMALLEST_NORMAL) if x >= 0.0 else math.nan),
        lambda y, x: 1 / build("max", x, SMALLEST_NORMAL), "log_positive({0})", "log({0})",
    ),
    "sqrt": _unary(
        torch.sqrt, math.sqrt, lambda y, x: 0.5 / y, "sqrtf({0})", "tl.sqrt({0})"
    ),
    "softplus": _unary(
        lambda x: -torch.nn.functional.logsigmoid(-x), _host_softplus,
        lambda y, x: build("sigmoid", x), "softplus({0}).value",
        "softplus_and_sigmoid({0})[0]",
    ),
    "sigmoid": _unary(
        torch.sigmoid, _host_sigmoid,
        lambda y, x: build("sigmoid_slope", x), "softplus({0}).sigmoid",
        "softplus_and_sigmoid({0})[1]",
    ),
    # sigmoid(x) sigmoid(-x), which y (1 - y) is not for large x.
    "sigmoid_slope": Operation(
        1, lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
        lambda x: _host_sigmoid(x) * _host_sigmoid(-x), _none, "softplus({0}).slope",
        "sigmoid_slope({0})",
    ),
    "tanh": _unary(
        torch.tanh, math.tanh, lambda y, x: 4 * build("sigmoid_slope", 2 * x),
        "tanh_bounded({0})", "tanh({0})",
    ),
    "sin": _unary(
        torch.sin, math.sin, lambda y, x: build("cos", x), "sin_cos({0}).sine",
        "sin_cos({0})[0]",
    ),
    "cos": _unary(
        torch.cos, math.cos, lambda y, x: -build("sin", x), "sin_cos({0}).cosine",
        "sin_cos({0})[1]",
    ),
    "sine": _unary(
        _sine, lambda c: math.sqrt(max((1 - c) * (1 + c), 0.0)),
        lambda y, c: -c / _bounded_sine(c), "sine_of_cosine({0})", "sine_of_cosine({0})",
    ),
    "acos": _unary(
        _acos, lambda c: math.acos(min(max(c, -1.0), 1.0)),
        lambda y, c: -1 / _bounded_sine(build("min", build("max", c, -1.0), 1.0)),
        "angle_of_cosine({0})", "angle_of_cosine({0})",
    ),
    "pow": Operation(
        2, _pow, _guarded(lambda x, t: 0.0 if x <= 0.0 else max(x, SMALLEST_BASE) ** t),
        _pow_rule, "pow_positive({0}, {1})", "pow_positive({0}, {1})",
    ),
    # First minus epsilon: at a tie the derivative of the first argument.
    "max": Operation(
        2, lambda x, y: torch.where(y > x, y, x), lambda x, y: y if y > x else x,
        lambda _, x, y: (constant(1), constant(1)),  # of the chosen one, see derive.py
        "({0} < {1} ? {1} : {0})", "tl.where({0} < {1}, {1}, {0})",
    ),
    "min": Operation(
        2, lambda x, y: torch.where(y < x, y, x), lambda x, y: y if y < x else x,
        lambda _, x, y: (constant(1), constant(1)),
        "({0} > {1} ? {1} : {0})", "tl.where({0} > {1}, {1}, {0})",
    ),
    "where": Operation(
        3, torch.where, lambda mask, x, y: x if mask else y,
        lambda _, mask, x, y: (None, constant(1), constant(1)),
        "({0} ? {1} : {2})", "tl.where({0}, {1}, {2})", mask_arguments=(0,),
    ),
    "detach": Operation(
        1, lambda x: x.detach(), lambda x: x, _none, "{0}", "{0}"
    ),
    "margin": Operation(
        3, _margin, _on_host(_margin), _margin_rule,
        "cosine_margin({0}, {1}, {2}).value", "cosine_margin({0}, {1}, {2})[0]",
    ),
    "margin_slope": Operation(
        3, _margin_slope, _on_host(_margin_slope), _none,
        "cosine_margin({0}, {1}, {2}).slope", "cosine_margin({0}, {1}, {2})[1]",
    ),
    "lt": _compare("{0} < {1}", lambda x, y: x < y, torch.lt),
    "le": _compare("{0} <= {1}", lambda x, y: x <= y, torch.le),
    "eq": _compare("{0} == {1}", lambda x, y: x == y, torch.eq),
    "and": Operation(
        2, torch.logical_and, lambda x, y: x and y, _none, "{0} & {1}", "{0} & {1}",
        gives_mask=True, mask_arguments=(0, 1),
    ),
    "or": Operation(
        2, torch.logical_or, lambda x, y: x or y, _none, "{0} | {1}", "{0} | {1}",
        gives_mask=True, mask_arguments=(0, 1),
    ),
    "not": Operation(
        1, torch.logical_not, lambda x: not x, _none, "!{0}", "{0} == 0",
        gives_mask=True, mask_arguments=(0,),
    ),
}  # fmt: skip
