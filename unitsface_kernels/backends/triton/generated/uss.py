# Generated from losses/uss.py by python -m unitsface_kernels.policy generate
"""USS: softplus over pairs of samples.

positive = scale * (cosine - margin) - threshold
negative = scale * cosine - threshold
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.policy import SumPolicy


@triton.jit
def logit(cosine, threshold, positive, params):
    scale = params[0]
    margin_times_scale = params[1]  # margin * scale
    return scale * cosine - tl.where(positive, threshold + margin_times_scale, threshold), scale


POLICY = SumPolicy(logit, threshold_slope=-1.0)
