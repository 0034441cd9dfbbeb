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
    # pi in two parts, so that the rest keeps its accuracy.
    rest = (angle - k * 3.1415927410125732) + k * 8.742278000372485e-08
    rest = tl.where(rest < 0.0, 0.0, tl.where(rest > 3.1415927410125732, 3.1415927410125732, rest))
    return k, rest


@triton.jit
def sin_cos_half_turn(angle):
    """sin and cos of an angle in [0, pi], by Taylor series around the nearer end.

    Folded to [0, pi / 2], where the first omitted terms are below 1e-9. tl.sin and tl.cos would
    bring a range reduction for any float32, which needs a stack.
    """
    obtuse = angle > 1.5707963267948966
    # pi in two parts, as above.
    y = tl.where(obtuse, (3.1415927410125732 - angle) - 8.742278000372485e-08, angle)
    z = y * y
    s = z * (-1.0 / 39916800 + z * (1.0 / 6227020800))
    s = z * (-1.0 / 5040 + z * (1.0 / 362880) + z * s)
    s = z * (-1.0 / 6 + z * (1.0 / 120) + z * s)
    c = z * (-1.0 / 3628800 + z * (1.0 / 479001600 - z * (1.0 / 87178291200)))
    c = z * (-1.0 / 720 + z * (1.0 / 40320) + z * c)
    c = 1.0 + z * (-0.5 + z * (1.0 / 24) + z * c)
    return y + y * s, tl.where(obtuse, -c, c)
