"""UCE and class BCE: a margin for the target, a weight for the other classes."""

from __future__ import annotations

import triton
import triton.language as tl

from .policy import SumPolicy


@triton.jit
def logit(cosine, threshold, positive, params):
    """Logit s (c - m - a c) - b, without m and a for a wrong class, and its derivative, for which
    the last c is a constant.

    ``params`` = (scale, margin, negative_weight, adaptive).
    """
    scale, margin, _, adaptive = params
    target = (scale - scale * adaptive) * cosine - (threshold + scale * margin)
    return tl.where(positive, target, scale * cosine - threshold), scale


def _weights(params: tuple[float, ...]) -> tuple[float, float]:
    return 1.0, params[2]


POLICY = SumPolicy(logit, weights=_weights)
