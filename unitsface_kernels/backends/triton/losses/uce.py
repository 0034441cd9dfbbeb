"""UCE and class BCE: a margin for the target, a weight for the other classes."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import softplus_and_sigmoid
from .policy import SumPolicy


@triton.jit
def evaluate(cosine, threshold, positive, params):
    """Value, d/d cosine and d/d threshold; ``params`` =
    (scale, margin, negative_weight, adaptive).
    """
    scale, margin, negative_weight, adaptive = params
    logit = scale * cosine - threshold
    # Target: softplus(-(s (c - m - a c) - b)), the last c a constant. That of a pair left out is
    # not finite, and such a pair is not positive.
    target = threshold - scale * (cosine - (margin + adaptive * cosine))
    value, share = softplus_and_sigmoid(tl.where(positive, target, logit))
    d_threshold = tl.where(positive, share, -negative_weight * share)
    return tl.where(positive, value, negative_weight * value), -scale * d_threshold, d_threshold


POLICY = SumPolicy(evaluate)
