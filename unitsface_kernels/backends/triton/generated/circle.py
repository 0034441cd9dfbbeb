# Generated from losses/circle.py by python -m unitsface_kernels.policy generate
"""Circle: logsumexps over pairs of samples.

positive = -(scale * detach(max(1 + margin - cosine, 0)) * (cosine - (1 - margin)))
negative = scale * detach(max(cosine + margin, 0)) * (cosine - margin)
finish = softplus(positives + negatives)
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params):
    scale = params[2]
    margin = params[3]
    x0 = cosine + margin
    x1 = tl.where(x0 < 0.0, 0.0, x0)
    return scale * (x1 * (cosine - margin)), scale * x1


@triton.jit
def positive(cosine, params):
    k0 = params[0]  # 1 + margin
    k1 = params[1]  # margin - 1
    scale = params[2]
    x0 = k0 - cosine
    x1 = tl.where(x0 < 0.0, 0.0, x0)
    return -(scale * (x1 * (cosine + k1))), -(scale * x1)


POLICY = LogsumexpPairsPolicy(negative, positive)
