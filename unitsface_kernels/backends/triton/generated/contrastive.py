# Generated from losses/contrastive.py by python -m unitsface_kernels.policy generate
"""Contrastive: sum over pairs of samples.

x0 = sqrt(max(2 - 2 * cosine, 0.0001))
x1 = where(distance == "euclidean", x0, 1 - cosine)
x2 = max(x1 - positive_margin, 0)
x3 = max(negative_margin - x1, 0)
positive = 0.5 * (x2 * x2)
negative = 0.5 * (x3 * x3)
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.policy import SumTermsPolicy


@triton.jit
def term(cosine, threshold, positive, params):
    distance_is_euclidean = params[0] != 0.0  # distance == "euclidean"
    positive_margin = params[1]
    negative_margin = params[2]
    x0 = 2.0 - 2.0 * cosine
    x1 = tl.sqrt(tl.where(x0 < 0.0001, 0.0001, x0))
    x2 = tl.where(distance_is_euclidean, x1, 1.0 - cosine)
    x3 = x2 - positive_margin
    x4 = negative_margin - x2
    x5 = tl.where(positive, x3, x4)
    x6 = tl.where(x5 < 0.0, 0.0, x5)
    x7 = 0.5 * (1.0 / x1 * tl.where(x0 < 0.0001, 0.0, -2.0))
    x8 = tl.where(distance_is_euclidean, x7, -1.0)
    value = 0.5 * (x6 * x6)
    dcosine = x6 * tl.where(positive, tl.where(x3 < 0.0, 0.0, x8), tl.where(x4 < 0.0, 0.0, -x8))
    return value, dcosine, tl.zeros_like(cosine) + 0.0


POLICY = SumTermsPolicy(term, heavy=True)
