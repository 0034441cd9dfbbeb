# Generated from losses/adacos.py by python -m unitsface_kernels.policy generate
"""AdaCos: logsumexp over samples and classes.

x0 = scale * cosine
positive = x0
negative = x0
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter requires it)

from unitsface_kernels.backends.triton.losses.policy import LogsumexpPolicy


@triton.jit
def negative(cosine, params, variables):
    return variables[0] * cosine, variables[0], cosine


POLICY = LogsumexpPolicy(negative, positive=None, linear=True)
