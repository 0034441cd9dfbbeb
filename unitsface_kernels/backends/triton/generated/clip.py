# Generated from losses/clip.py by python -m unitsface_kernels.policy generate
"""CLIP: logsumexps over pairs of samples.

x0 = scale * cosine
positive = x0
negative = x0
finish = softplus(negatives - positives)
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter requires it)

from unitsface_kernels.backends.triton.losses.policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params, variables):
    return variables[0] * cosine, variables[0], cosine


@triton.jit
def positive(cosine, params, variables):
    return variables[0] * cosine, variables[0], cosine


POLICY = LogsumexpPairsPolicy(negative, positive)
