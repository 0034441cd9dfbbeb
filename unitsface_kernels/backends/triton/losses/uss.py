"""USS: the distance of a cosine to the threshold."""

from __future__ import annotations

import triton
import triton.language as tl

from .policy import SumPolicy


@triton.jit
def logit(cosine, threshold, positive, params):
    """Logit s (c - m) - b, without the margin for a negative pair, and its derivative;
    ``params`` = (scale, margin)."""
    scale, margin = params
    target = scale * cosine - (threshold + scale * margin)
    return tl.where(positive, target, scale * cosine - threshold), scale


POLICY = SumPolicy(logit)
