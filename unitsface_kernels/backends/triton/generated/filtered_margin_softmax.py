# Generated from losses/filtered_margin_softmax.py by python -m unitsface_kernels.policy generate
"""FilteredMarginSoftmax: logsumexp over samples and classes.

x0 = cosine - adaptive_margin * detach(cosine)
x1 = margin(x0, m1, m2)
x2 = where(margin_gradient == "detached", x0 + detach(x1 - x0), x1) - m3
is0 = interclass_filtering_threshold < cosine
positive = scale * x2
negative = where((interclass_filtering_threshold > 0) & is0, 0, scale * cosine)
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.math import cosine_margin
from unitsface_kernels.backends.triton.losses.policy import LogsumexpPolicy


@triton.jit
def negative(cosine, params):
    scale = params[3]
    interclass_filtering_threshold = params[6]
    k7 = params[7] != 0.0  # 0 < interclass_filtering_threshold
    is0 = k7 & (interclass_filtering_threshold < cosine)
    return tl.where(is0, 0.0, scale * cosine), tl.where(is0, 0.0, scale)


@triton.jit
def positive(cosine, params):
    one_minus_adaptive_margin = params[0]  # 1 - adaptive_margin
    m1 = params[1]
    m2 = params[2]
    scale = params[3]
    m3_times_scale = params[4]  # m3 * scale
    margin_gradient_is_detached = params[5] != 0.0  # margin_gradient == "detached"
    x0 = one_minus_adaptive_margin * cosine
    part0 = cosine_margin(x0, m1, m2)
    value = scale * part0[0] - m3_times_scale
    dcosine = scale * tl.where(margin_gradient_is_detached, 1.0, part0[1])
    return value, dcosine


POLICY = LogsumexpPolicy(negative, positive)
