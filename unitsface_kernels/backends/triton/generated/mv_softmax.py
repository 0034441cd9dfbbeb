# Generated from losses/mv_softmax.py by python -m unitsface_kernels.policy generate
"""MVSoftmax: logsumexp over samples and classes.

x0 = cos(margin)
x1 = sin(margin)
x2 = where(margin_type == "am", cosine - margin, cosine * x0 - sine(cosine) * x1)
x3 = target_cosine * x0 - sine(target_cosine) * x1
is0 = where(margin_type == "am", target_cosine - margin, x3) < cosine
x4 = cosine + (where(weighting == "adaptive", t, 0) * cosine + t)
positive = scale * where(margin_at == "all" | (cosine > 0), x2, cosine)
negative = scale * where(is0, x4, cosine)
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.math import sine_of_cosine
from unitsface_kernels.backends.triton.losses.policy import LogsumexpPolicy


@triton.jit
def negative(cosine, params, variables):
    margin = params[1]
    cos_margin = params[2]  # cos(margin)
    sin_margin = params[3]  # sin(margin)
    margin_type_is_am = params[4] != 0.0  # margin_type == "am"
    scale = params[5]
    k6 = params[6]  # where(weighting == "adaptive", t, 0) + 1
    t = params[7]
    k8 = params[8]  # 1 + where(weighting == "adaptive", t, 0)
    x0 = cos_margin * variables[0] - sin_margin * sine_of_cosine(variables[0])
    is0 = tl.where(margin_type_is_am, variables[0] - margin, x0) < cosine
    return scale * tl.where(is0, k6 * cosine + t, cosine), scale * tl.where(is0, k8, 1.0), 0.0


POLICY = LogsumexpPolicy(negative, positive=None)
