"""Multi-Similarity: positives and negatives at scales of their own, around one cosine."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  (the interpreter requires it)

from .policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params):
    """Logit of a negative pair and its derivative; ``params`` = (alpha, beta, base)."""
    _, beta, base = params
    return beta * (cosine - base), beta


@triton.jit
def positive(cosine, params):
    """Logit of a positive pair and its derivative."""
    alpha, _, base = params
    return -alpha * (cosine - base), -alpha


POLICY = LogsumexpPairsPolicy(negative, positive)
