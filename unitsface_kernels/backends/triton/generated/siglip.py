# Generated from losses/siglip.py by python -m unitsface_kernels.policy generate
"""SigLIP: softplus over pairs of samples.

x0 = scale * cosine - threshold
positive = x0
negative = x0
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.math import softplus_and_sigmoid
from unitsface_kernels.backends.triton.losses.policy import SumTermsPolicy


@triton.jit
def term(cosine, threshold, positive, params, variables):
    x0 = variables[0] * cosine
    x1 = tl.where(positive, threshold - x0, x0 - threshold)
    part0 = softplus_and_sigmoid(x1)
    x2 = tl.where(positive, -part0[1], part0[1])
    return part0[0], x2 * variables[0], -x2, x2 * cosine


POLICY = SumTermsPolicy(term, heavy=True)
