# Generated from losses/pair_logsumexp.py by python -m unitsface_kernels.policy generate
"""PairLogsumexp: logsumexp over pairs of samples.

negative = where((cosine < lower) | (upper < cosine), -inf, scale * cosine)
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params):
    lower = params[0]
    upper = params[1]
    scale = params[2]
    is0 = (cosine < lower) | (upper < cosine)
    return tl.where(is0, -float("inf"), scale * cosine), tl.where(is0, 0.0, scale)


POLICY = LogsumexpPairsPolicy(negative, positive=None)
