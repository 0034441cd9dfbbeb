"""Margin softmax: NormFace, CosFace, ArcFace, SphereFace-R and their combination."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import acos, half_turns, sin_cos_half_turn
from .policy import LogsumexpPolicy


@triton.jit
def negative(cosine, params):
    """Logit of a wrong class and its derivative; ``params`` =
    (scale, m1, m2, m3, detached, adaptive)."""
    scale = params[0]
    return scale * cosine, scale


@triton.jit
def positive(cosine, params):
    """Logit ``s (cos(m1 theta + m2) - m3)`` of a target and its derivative by the cosine.

    theta is the angle of ``c - a c``, whose second term is a constant. Past pi the margin continues
    monotonically, ``(-1)^k cos(angle) - 2k`` with ``k = floor(angle / pi)``: that is
    ``cos(angle - k pi) - 2k``, one branch for every k.
    """
    scale, m1, m2, m3, detached, adaptive = params
    shrunk = cosine - adaptive * cosine
    # Comparisons rather than tl.minimum and tl.maximum, which would hide a NaN.
    clipped = tl.where(shrunk > 1.0, 1.0, tl.where(shrunk < -1.0, -1.0, shrunk))
    # (1 - c)(1 + c) keeps the accuracy that 1 - c^2 loses at small angles.
    sin_theta = tl.sqrt((1.0 - clipped) * (1.0 + clipped))
    turns, rest = half_turns(m1 * acos(clipped) + m2)
    sin_rest, cos_rest = sin_cos_half_turn(rest)
    # An added margin alone needs no angle but to find k: more accurate, and most used.
    turns_2, rest_2 = half_turns(m2)
    sin_2, cos_2 = sin_cos_half_turn(rest_2)
    odd = turns + turns_2
    sign = 1.0 - 2.0 * (odd - 2.0 * tl.floor(odd * 0.5))
    sin_rest = tl.where(m1 == 1.0, sign * (sin_theta * cos_2 + clipped * sin_2), sin_rest)
    cos_rest = tl.where(m1 == 1.0, sign * (clipped * cos_2 - sin_theta * sin_2), cos_rest)
    no_angle = (m1 == 1.0) & (m2 == 0.0)
    target = tl.where(no_angle, shrunk, cos_rest - 2.0 * turns)
    slope = m1 * sin_rest / tl.where(sin_theta < 1e-4, 1e-4, sin_theta)
    slope = tl.where(no_angle | (detached != 0.0), 1.0, slope)
    return scale * (target - m3), scale * slope


POLICY = LogsumexpPolicy(negative, positive, linear=True)
