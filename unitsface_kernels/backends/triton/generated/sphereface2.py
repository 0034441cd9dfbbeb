# Generated from losses/sphereface2.py by python -m unitsface_kernels.policy generate
"""SphereFace2: softplus over samples and classes.

x0 = where(margin_type == "A", margin, 0)
x1 = cos(x0)
x2 = (where(cosine < -x1, -1, cosine * x1 - sine(cosine) * sin(x0)) + 1) / 2
x3 = 2 * pow(x2, t) - 1
x4 = where(margin_type == "A", 0, margin)
x5 = where(margin_gradient == "exact", x3, cosine + detach(x3 - cosine)) - x4
x6 = 2 * pow((cosine + 1) / 2, t) - 1
x7 = where(margin_gradient == "exact", x6, cosine + detach(x6 - cosine)) + x4
x8 = loss_weight / scale
positive = scale * x5 + threshold
negative = scale * x7 + threshold
positive_weight = x8 * alpha
negative_weight = x8 * (1 - alpha)
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.math import pow_positive, sine_of_cosine
from unitsface_kernels.backends.triton.losses.policy import SumPolicy


@triton.jit
def logit(cosine, threshold, positive, params):
    k0 = params[0]  # -cos(where(margin_type == "A", margin, 0))
    k1 = params[1]  # cos(where(margin_type == "A", margin, 0))
    k2 = params[2]  # sin(where(margin_type == "A", margin, 0))
    t = params[3]
    k4 = params[4]  # scale * 2
    k5 = params[5]  # (where(margin_type == "A", 0, margin) + 1) * scale
    k6 = params[6]  # scale * (where(margin_type == "A", 0, margin) - 1)
    k7 = params[7]  # 2 * t * 0.5
    margin_gradient_is_exact = params[8] != 0.0  # margin_gradient == "exact"
    scale = params[9]
    is0 = cosine < k0
    x0 = sine_of_cosine(cosine)
    x1 = 0.5 * tl.where(positive, tl.where(is0, -1.0, k1 * cosine - k2 * x0), cosine) + 0.5
    x2 = pow_positive(x1, t)
    x3 = tl.where(is0, 0.0, k2 * (cosine / tl.where(x0 < 0.0001, 0.0001, x0)) + k1)
    x4 = k7 * (x2 / tl.where(x1 < 1e-30, 1e-30, x1) * tl.where(positive, x3, 1.0))
    value = k4 * x2 + tl.where(positive, threshold - k5, threshold + k6)
    dcosine = scale * tl.where(margin_gradient_is_exact, x4, 1.0)
    return value, dcosine


def _weights(params: tuple[float, ...]) -> tuple[float, float]:
    return params[10], params[11]


POLICY = SumPolicy(logit, threshold_slope=1.0, weights=_weights, heavy=True)
