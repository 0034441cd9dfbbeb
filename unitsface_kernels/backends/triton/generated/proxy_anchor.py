# Generated from losses/proxy_anchor.py by python -m unitsface_kernels.policy generate
"""ProxyAnchor: logsumexps over pairs of samples.

positive = -(alpha * (cosine - margin))
negative = alpha * (cosine + margin)
finish = softplus(positives) / share_with_positives + softplus(negatives)
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter requires it)

from unitsface_kernels.backends.triton.losses.policy import LogsumexpPairsPolicy


@triton.jit
def negative(cosine, params):
    alpha = params[0]
    alpha_times_margin = params[2]  # alpha * margin
    return alpha * cosine + alpha_times_margin, alpha


@triton.jit
def positive(cosine, params):
    alpha = params[0]
    margin_times_alpha = params[1]  # margin * alpha
    minus_alpha = params[3]  # -alpha
    return margin_times_alpha - alpha * cosine, minus_alpha


POLICY = LogsumexpPairsPolicy(negative, positive)
