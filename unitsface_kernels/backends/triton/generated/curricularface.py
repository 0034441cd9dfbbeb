# Generated from losses/curricularface.py by python -m unitsface_kernels.policy generate
"""CurricularFace: logsumexp over samples and classes.

x0 = cos(margin)
x1 = sin(margin)
x2 = where(-x0 < cosine, cosine * x0 - sine(cosine) * x1, cosine - margin * x1)
is0 = target_cosine * x0 - sine(target_cosine) * x1 < cosine
positive = scale * x2
negative = scale * where(is0, cosine * (t + cosine), cosine)
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.math import sine_of_cosine
from unitsface_kernels.backends.triton.losses.policy import LogsumexpPolicy


@triton.jit
def negative(cosine, params, variables):
    cos_margin = params[1]  # cos(margin)
    sin_margin = params[2]  # sin(margin)
    scale = params[4]
    is0 = cos_margin * variables[1] - sin_margin * sine_of_cosine(variables[1]) < cosine
    value = scale * tl.where(is0, cosine * (cosine + variables[0]), cosine)
    dcosine = scale * tl.where(is0, 2.0 * cosine + variables[0], 1.0)
    slope0 = scale * tl.where(is0, cosine, 0.0)
    return value, dcosine, slope0, 0.0


POLICY = LogsumexpPolicy(negative, positive=None)
