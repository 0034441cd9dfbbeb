# Generated from losses/uce.py by python -m unitsface_kernels.policy generate
"""UCE: softplus over samples and classes.

positive = scale * (cosine - (margin + adaptive_margin * detach(cosine))) - threshold
negative = scale * cosine - threshold
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.policy import SumPolicy


@triton.jit
def logit(cosine, threshold, positive, params):
    k0 = params[0]  # scale * (1 - adaptive_margin)
    scale = params[1]
    margin_times_scale = params[2]  # margin * scale
    x0 = tl.where(positive, threshold + margin_times_scale, threshold)
    return tl.where(positive, k0, scale) * cosine - x0, scale


def _weights(params: tuple[float, ...]) -> tuple[float, float]:
    return 1.0, params[3]


POLICY = SumPolicy(logit, threshold_slope=-1.0, weights=_weights)
