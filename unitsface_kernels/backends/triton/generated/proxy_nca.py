# Generated from losses/proxy_nca.py by python -m unitsface_kernels.policy generate
"""ProxyNCA: logsumexps over samples and classes.

x0 = 2 * scale * cosine
x1 = where(negatives < -1e+29, 0, negatives - positives)
positive = x0
negative = x0
finish = where(denominator == "all", softplus(x1), x1)
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter requires it)

from unitsface_kernels.backends.triton.losses.policy import LogsumexpPolicy


@triton.jit
def negative(cosine, params):
    k0 = params[0]  # 2 * scale
    return k0 * cosine, k0


@triton.jit
def positive(cosine, params):
    k0 = params[0]  # 2 * scale
    return k0 * cosine, k0


POLICY = LogsumexpPolicy(negative, positive, linear=True)
