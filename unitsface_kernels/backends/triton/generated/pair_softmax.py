# Generated from losses/pair_softmax.py by python -m unitsface_kernels.policy generate
"""PairSoftmax: logsumexp over pairs of samples.

positive = scale * (cosine - margin)
negative = scale * cosine
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter requires it)

from unitsface_kernels.backends.triton.losses.policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params):
    scale = params[0]
    return scale * cosine, scale


@triton.jit
def positive(cosine, params):
    scale = params[0]
    margin_times_scale = params[1]  # margin * scale
    return scale * cosine - margin_times_scale, scale


POLICY = LogsumexpPairsPolicy(negative, positive)
