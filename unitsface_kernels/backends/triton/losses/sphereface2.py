"""SphereFace2: an adjusted cosine and a bias, with either margin."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import sin_cos_half_turn
from .policy import SumPolicy


@triton.jit
def logit(cosine, threshold, positive, params):
    """Logit of each pair and its derivative.

    ``params`` = (scale, margin, t, alpha, loss_weight, angular, exact); the adjusted cosine is
    g(c) = 2 ((c + 1) / 2)^t - 1. An additive margin is taken from it, an angular one is added to
    the target's angle before, up to pi.
    """
    scale, margin, t, _, _, angular, exact = params
    sin_margin, cos_margin = sin_cos_half_turn(margin)
    is_angular = angular != 0.0
    sin_margin = tl.where(is_angular, sin_margin, 0.0)
    cos_margin = tl.where(is_angular, cos_margin, 1.0)
    shift = tl.where(is_angular, 0.0, margin)
    # Comparisons rather than tl.minimum and tl.maximum, which would hide a NaN.
    c = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))
    sine = tl.sqrt((1.0 - c) * (1.0 + c))
    past = c < -cos_margin
    moved = tl.where(past, -1.0, c * cos_margin - sine * sin_margin)
    turn = cos_margin + c * sin_margin / tl.where(sine < 1e-4, 1e-4, sine)
    turn = tl.where(positive, tl.where(past, 0.0, turn), 1.0)
    base = 0.5 + 0.5 * tl.where(positive, moved, c)
    # Not quite 0, so that half^t / half has a limit.
    half = tl.where(base > 1.0, 1.0, tl.where(base < 1e-30, 1e-30, base))
    # Products for the usual exponents: a logarithm times t loses a bit or two.
    power = tl.where(t == 3.0, half * half * half, tl.exp2(t * tl.log2(half)))
    power = tl.where(t == 1.0, half, tl.where(t == 2.0, half * half, power))
    slope = tl.where(exact != 0.0, t * power / half * turn, 1.0)
    # 1e-30 to a small t is far from 0.
    adjusted = 2.0 * tl.where(base <= 0.0, 0.0, power) - 1.0
    z = scale * (adjusted + tl.where(positive, -shift, shift)) + threshold
    return z, scale * slope


def _weights(params: tuple[float, ...]) -> tuple[float, float]:
    scale, alpha, loss_weight = params[0], params[3], params[4]
    return loss_weight / scale * alpha, loss_weight / scale * (1.0 - alpha)


POLICY = SumPolicy(logit, threshold_slope=1.0, weights=_weights, heavy=True)
