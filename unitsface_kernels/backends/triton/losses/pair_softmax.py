"""Pair softmax: cosines at a scale, positives less a margin."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  (the interpreter requires it)

from .policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params):
    """Logit of a negative pair and its derivative; ``params`` = (scale, margin)."""
    scale = params[0]
    return scale * cosine, scale


@triton.jit
def positive(cosine, params):
    """Logit of a positive pair and its derivative."""
    scale, margin = params
    return scale * (cosine - margin), scale


POLICY = LogsumexpPairsPolicy(negative, positive)
