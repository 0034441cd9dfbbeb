"""Log-sum-exp of the negatives whose cosine lies in an interval."""

from __future__ import annotations

import triton
import triton.language as tl

from .policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params):
    """Logit of a negative pair and its derivative; ``params`` = (scale, lower, upper)."""
    scale, lower, upper = params
    # False for NaN, which stays.
    outside = (cosine < lower) | (cosine > upper)
    return tl.where(outside, -float("inf"), scale * cosine), tl.where(outside, 0.0, scale)


POLICY = LogsumexpPairsPolicy(negative, positive=None)
