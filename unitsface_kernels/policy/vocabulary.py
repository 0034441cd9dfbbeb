"""The functions that formulas are written with, beside operators and comparisons."""

from __future__ import annotations

from .expression import Expression, build, constant, is_const, lift, value_of

Number = Expression | float


def exp(x: Number) -> Expression:
    """e to the x; arguments beyond [-87, 88] count as those."""
    return build("exp", x)


def log(x: Number) -> Expression:
    """Natural logarithm of x > 0."""
    return build("log", x)


def softplus(x: Number) -> Expression:
    """log(1 + e^x), accurate relative to itself for any x."""
    return build("softplus", x)


def sigmoid(x: Number) -> Expression:
    """1 / (1 + e^-x), accurate relative to itself for any x."""
    return build("sigmoid", x)


def tanh(x: Number) -> Expression:
    return build("tanh", x)


def sqrt(x: Number) -> Expression:
    return build("sqrt", x)


def abs(x: Number) -> Expression:
    """|x|; at 0 its derivative is 1."""
    return build("abs", x)


def minimum(x: Number, y: Number) -> Expression:
    """The smaller one; of equal ones the derivative of the first that depends on the pair."""
    return _extreme("min", x, y)


def maximum(x: Number, y: Number) -> Expression:
    """The larger one; of equal ones the derivative of the first that depends on the pair."""
    return _extreme("max", x, y)


def _extreme(op: str, x: Number, y: Number) -> Expression:
    # What depends on the pair is the first one: NaN of the first survives.
    x, y = lift(x), lift(y)
    return build(op, y, x) if y.pairwise and not x.pairwise else build(op, x, y)


def clamp(x: Number, low: Number, high: Number) -> Expression:
    """x in [low, high]; at the ends its derivative is 1."""
    return build("min", build("max", x, low), high)


def where(mask: Expression | bool, yes: Number, no: Number) -> Expression:
    """``yes`` where ``mask`` holds, else ``no``; both must be finite."""
    return build("where", mask, yes, no)


def cos(angle: Number) -> Expression:
    return build("cos", angle)


def sin(angle: Number) -> Expression:
    return build("sin", angle)


def acos(c: Number) -> Expression:
    """Angle of a cosine clipped to [-1, 1]; its derivative is -1 / max(sin, 1e-4)."""
    return build("acos", c)


def sine(c: Number) -> Expression:
    """Sine of the angle whose cosine is c; its derivative is -c / max(sin, 1e-4)."""
    return build("sine", c)


def square(x: Number) -> Expression:
    x = lift(x)
    return build("mul", x, x)


def pow(x: Number, t: Number) -> Expression:
    """x^t for x >= 0; constant whole exponents from 0 to 16 are multiplied out, for any x."""
    exponent = lift(t)
    if is_const(exponent) and value_of(exponent) in range(17):
        return _whole_power(lift(x), int(value_of(exponent)))
    return build("pow", x, exponent)


def _whole_power(x: Expression, t: int) -> Expression:
    if t < 2:
        return x if t else constant(1)
    half = _whole_power(x, t // 2)
    squared = build("mul", half, half)
    return build("mul", squared, x) if t % 2 else squared


def detach(x: Number) -> Expression:
    """x as a constant: its derivative is 0."""
    return build("detach", x)


def cosine_margin(c: Number, m1: Number = 1.0, m2: Number = 0.0) -> Expression:
    """cos(m1 theta + m2) of the angle theta of c, continued past pi as (-1)^k cos(.) - 2k.

    As of :func:`fused_margin_softmax_loss`; sin(theta) is at least 1e-4 in the derivative.
    """
    return build("margin", c, m1, m2)
