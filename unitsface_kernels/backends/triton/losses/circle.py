"""Circle: weights of pairs are constants of the gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params):
    """Logit of a negative pair and its derivative; ``params`` = (scale, margin)."""
    scale, margin = params
    gap = cosine + margin
    # False for NaN, which stays.
    weight = scale * tl.where(gap < 0.0, 0.0, gap)
    return weight * (cosine - margin), weight


@triton.jit
def positive(cosine, params):
    """Logit of a positive pair and its derivative."""
    scale, margin = params
    gap = (1.0 + margin) - cosine
    weight = -scale * tl.where(gap < 0.0, 0.0, gap)
    return weight * (cosine - (1.0 - margin)), weight


POLICY = LogsumexpPairsPolicy(negative, positive)
