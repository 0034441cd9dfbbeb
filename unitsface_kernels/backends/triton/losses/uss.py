"""USS: softplus of the distance to the threshold, on either side of it."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import softplus_and_sigmoid
from .policy import SumPolicy


@triton.jit
def evaluate(cosine, threshold, positive, params):
    """Value, d/d cosine and d/d threshold of each pair; ``params`` = (scale, margin)."""
    scale, margin = params
    logit = scale * cosine - threshold
    # Positive pairs: softplus(-(s (c - m) - b)).
    value, share = softplus_and_sigmoid(tl.where(positive, scale * margin - logit, logit))
    d_threshold = tl.where(positive, share, -share)
    return value, -scale * d_threshold, d_threshold


POLICY = SumPolicy(evaluate)
