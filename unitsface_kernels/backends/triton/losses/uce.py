"""UCE and class BCE: a margin for the target, a weight for the other classes."""

from __future__ import annotations

import triton
import triton.language as tl

from .math import softplus_and_sigmoid


@triton.jit
def evaluate(cosine, threshold, positive, params):
    """Value, d/d cosine and d/d threshold; ``params`` = (scale, margin, negative_weight)."""
    scale, margin, negative_weight = params
    logit = scale * cosine - threshold
    # Target: softplus(-(s (c - m) - b)).
    value, share = softplus_and_sigmoid(tl.where(positive, scale * margin - logit, logit))
    d_threshold = tl.where(positive, share, -negative_weight * share)
    return tl.where(positive, value, negative_weight * value), -scale * d_threshold, d_threshold


def slope_bound(params: tuple[float, ...]) -> float:
    """The largest |d value / d cosine|."""
    scale, _, negative_weight = params
    return abs(scale) * max(1.0, abs(negative_weight))
