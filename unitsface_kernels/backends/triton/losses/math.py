"""Scalar functions of the policies, out of operations that compile and interpret alike.

The coefficients are minimax fits of relative error, made for this file by iteratively reweighted
least squares on Chebyshev nodes.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The interpreter has no inline assembly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def reciprocal(x):
    """1 / x to one unit in the last place, for normal x; a division has guards for all others."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exponential_and_sigmoid(x, sign):
    """exp(-|x|) and ``sign`` times sigmoid(x), for a sign of 1 or -1.

    Accurate relative to themselves, and made of what is one instruction on a GPU each.
    """
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    share = reciprocal(e * sign + sign)
    return e, tl.where(x > 0, share, e * share)


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + e^x) and its derivative, both accurate relative to themselves.

    The sum over a million far negatives keeps their share, which log(1 + e) would round away.
    """
    e, sigmoid = exponential_and_sigmoid(x, 1.0)
    return _log1p_to_1(e) + tl.maximum(x, 0.0), sigmoid


@triton.jit
def sigmoid_slope(x):
    """sigmoid(x) sigmoid(-x), the derivative of the sigmoid, accurate relative to itself."""
    e, share = exponential_and_sigmoid(-tl.abs(x), 1.0)
    return share * reciprocal(1.0 + e)


@triton.jit
def _log1p_to_1(x):
    """log(1 + x) for x in [0, 1]: x times a degree-7 polynomial, to 2e-7."""
    p = -8.539198448e-03 * x + 4.408959634e-02
    p = p * x - 1.076816642e-01
    p = p * x + 1.774523810e-01
    p = p * x - 2.449546164e-01
    p = p * x + 3.327547957e-01
    p = p * x - 4.999740538e-01
    p = p * x + 9.999998057e-01
    return p * x


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate relative to itself; NaN stays."""
    # 1 + x = 2^k (1 + rest), without the rounding of 1 + x where x is small.
    power = (1.0 + x).to(tl.int32, bitcast=True) & 0x7F800000
    shrink = (0x7F000000 - power).to(tl.float32, bitcast=True)
    rest = x * shrink + (shrink - 1.0)
    return _log1p_to_1(rest) + ((power >> 23) - 127).to(tl.float32) * 0.6931471805599453


@triton.jit
def log1p_of_both(a, b):
    """c with log1p(c) = log1p(a) + log1p(b): (1 + a)(1 + b) - 1, accurate for small ones."""
    return a * b + (a + b)


@triton.jit
def acos(x):
    """Angle of a cosine in [-1, 1]: sqrt(1 - |x|) times a degree-8 polynomial, to 2e-9.

    The square root carries the singularity, so small angles keep their relative accuracy.
    """
    c = tl.abs(x)
    p = 7.091754588e-04 * c - 4.073795650e-03
    p = p * c + 1.119083863e-02
    p = p * c - 2.086636979e-02
    p = p * c + 3.263689361e-02
    p = p * c - 5.061052637e-02
    p = p * c + 8.903229154e-02
    p = p * c - 2.146012656e-01
    p = p * c + 1.570796323e00
    angle = p * tl.sqrt(1.0 - c)
    return tl.where(x < 0, 3.141592653589793 - angle, angle)


@triton.jit
def half_turns(angle):
    """k = floor(angle / pi) and angle - k pi in [0, pi], for moderate angles.

    The rounded quotient can be one off next to a multiple of pi; the rest is clipped there.
    """
    k = tl.floor(angle * 0.3183098861837907)
    # pi in three parts, of which k times the first two is exact: the rest keeps its accuracy.
    rest = angle - k * 3.140625 - k * 9.67502593994140625e-4 - k * 1.5099579909783764e-7
    rest = tl.where(rest < 0.0, 0.0, tl.where(rest > 3.1415927410125732, 3.1415927410125732, rest))
    return k, rest


@triton.jit
def sin_cos_half_turn(angle):
    """sin and cos of an angle in [0, pi], by Taylor series around the nearer end.

    Folded to [0, pi / 2], where the first omitted terms are below 1e-9. tl.sin and tl.cos would
    bring a range reduction for any float32, which needs a stack.
    """
    obtuse = angle > 1.5707963267948966
    # pi in two parts, for the same reason.
    y = tl.where(obtuse, (3.1415927410125732 - angle) - 8.742278000372485e-08, angle)
    z = y * y
    s = z * (-1.0 / 39916800 + z * (1.0 / 6227020800))
    s = z * (-1.0 / 5040 + z * (1.0 / 362880) + z * s)
    s = z * (-1.0 / 6 + z * (1.0 / 120) + z * s)
    c = z * (-1.0 / 3628800 + z * (1.0 / 479001600 - z * (1.0 / 87178291200)))
    c = z * (-1.0 / 720 + z * (1.0 / 40320) + z * c)
    c = 1.0 + z * (-0.5 + z * (1.0 / 24) + z * c)
    return y + y * s, tl.where(obtuse, -c, c)


@triton.jit
def exp(x):
    """e^x; arguments beyond [-87, 88] count as these."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def log(x):
    """log(x) for x > 0; smaller than the smallest normal number counts as that, NaN for x < 0."""
    normal = tl.where(x < 1.1754943508222875e-38, 1.1754943508222875e-38, x)
    logarithm = tl.log2(normal) * 0.6931471805599453
    return tl.where(x < 0.0, float("nan"), logarithm)


@triton.jit
def tanh(x):
    """tanh(x) to 2e-7 of itself: next to 0 an odd polynomial, a minimax fit of relative error."""
    u = x * x
    p = -6.096934926e-03 * u + 2.099735213e-02
    p = p * u - 5.385095206e-02
    p = p * u + 1.333277007e-01
    p = p * u - 3.333332895e-01
    magnitude = tl.abs(x)
    e = tl.exp2(magnitude * -2.8853900817779268)
    large = (1.0 - e) * reciprocal(1.0 + e)
    return tl.where(magnitude < 0.625, x + x * u * p, tl.where(x < 0.0, -large, large))


@triton.jit
def is_odd(k):
    """1 for an odd integer, else 0."""
    return k - 2.0 * tl.floor(k * 0.5)


@triton.jit
def sin_cos(angle):
    """sin and cos of an angle of up to some thousand turns."""
    turns, rest = half_turns(angle)
    sine, cosine = sin_cos_half_turn(rest)
    sign = 1.0 - 2.0 * is_odd(turns)
    return sign * sine, sign * cosine


@triton.jit
def sine_of_cosine(c):
    """sqrt(1 - c^2) of a cosine, 0 beyond [-1, 1]."""
    # 1 - c^2 would lose accuracy at small angles.
    square = (1.0 - c) * (1.0 + c)
    return tl.sqrt(tl.where(square < 0.0, 0.0, square))


@triton.jit
def angle_of_cosine(c):
    """Angle of a cosine clipped to [-1, 1]."""
    return acos(tl.where(c > 1.0, 1.0, tl.where(c < -1.0, -1.0, c)))


@triton.jit
def pow_positive(x, t):
    """x^t for x > 0, where x is at least 1e-30; 0 for x <= 0."""
    base = tl.where(x < 1e-30, 1e-30, x)
    # Products for the usual exponents: a logarithm times t loses a bit or two.
    power = tl.where(t == 3.0, base * base * base, exp(t * log(base)))
    power = tl.where(t == 1.0, base, tl.where(t == 2.0, base * base, power))
    return tl.where(x <= 0.0, 0.0, power)


@triton.jit
def cosine_margin(cosine, m1, m2):
    """cos(m1 theta + m2) of the angle theta of ``cosine``, and its derivative by the cosine.

    Past pi the margin continues monotonically, ``(-1)^k cos(angle) - 2k`` with
    ``k = floor(angle / pi)``: that is ``cos(angle - k pi) - 2k``, one branch for every k. In the
    derivative sin(theta) is at least 1e-4.
    """
    # Comparisons rather than tl.minimum and tl.maximum, which would hide a NaN.
    clipped = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    sin_theta = sine_of_cosine(clipped)
    turns, rest = half_turns(m1 * acos(clipped) + m2)
    sin_rest, cos_rest = sin_cos_half_turn(rest)
    # An added margin alone needs no angle but to find k: more accurate, and most used.
    turns_2, rest_2 = half_turns(m2)
    sin_2, cos_2 = sin_cos_half_turn(rest_2)
    sign = 1.0 - 2.0 * is_odd(turns + turns_2)
    added = m1 == 1.0
    sin_rest = tl.where(added, sign * (sin_theta * cos_2 + clipped * sin_2), sin_rest)
    cos_rest = tl.where(added, sign * (clipped * cos_2 - sin_theta * sin_2), cos_rest)
    plain = added & (m2 == 0.0)
    slope = m1 * sin_rest / tl.where(sin_theta < 1e-4, 1e-4, sin_theta)
    return tl.where(plain, cosine, cos_rest - 2.0 * turns), tl.where(plain, 1.0, slope)
