"""Scalar functions of the policies, out of operations that compile and interpret alike.

The coefficients are minimax fits of relative error, made for this file by iteratively reweighted
least squares on Chebyshev nodes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + e^x) and its derivative, both accurate relative to themselves.

    With e = exp(-|x|) in [0, 1], log1p(e) is e times a degree-7 polynomial, to 2e-7: the sum over
    a million far negatives keeps their share, which log(1 + e) would round away.

    The work on a tile is mostly this function, so it is made of what is one instruction on a GPU:
    exp2 and rsqrt are, while exp and a division bring guards for ranges that cannot occur here.
    """
    e = tl.exp2(tl.abs(x) * -1.4426950408889634)
    p = -8.539198448e-03 * e + 4.408959634e-02
    p = p * e - 1.076816642e-01
    p = p * e + 1.774523810e-01
    p = p * e - 2.449546164e-01
    p = p * e + 3.327547957e-01
    p = p * e - 4.999740538e-01
    p = p * e + 9.999998057e-01
    value = p * e + tl.maximum(x, 0.0)
    root = tl.rsqrt(1.0 + e)
    sigmoid = tl.where(x > 0, 1.0, e) * (root * root)
    return value, sigmoid


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
