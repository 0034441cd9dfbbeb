# Generated from losses/multi_similarity.py by python -m unitsface_kernels.policy generate
"""MultiSimilarity: logsumexps over pairs of samples.

x0 = cosine - base
positive = -(alpha * x0)
negative = beta * x0
finish = softplus(positives) / alpha + softplus(negatives) / beta
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter requires it)

from unitsface_kernels.backends.triton.losses.policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params):
    beta = params[2]
    base_times_beta = params[3]  # base * beta
    return beta * cosine - base_times_beta, beta


@triton.jit
def positive(cosine, params):
    alpha = params[0]
    base_times_alpha = params[1]  # base * alpha
    minus_alpha = params[4]  # -alpha
    return base_times_alpha - alpha * cosine, minus_alpha


POLICY = LogsumexpPairsPolicy(negative, positive)
