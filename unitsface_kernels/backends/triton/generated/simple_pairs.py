# Generated from losses/simple_pairs.py by python -m unitsface_kernels.policy generate
"""SimPLE: softplus over pairs of samples.

x0 = cosine - b_theta * row_norm * column_norm
positive = (x0 - margin + threshold) / r
negative = (x0 + margin + threshold) * r
positive_weight = loss_weight * alpha / positives_per_row
negative_weight = loss_weight * (1 - alpha) / negatives_per_row
"""

import triton
import triton.language as tl

from unitsface_kernels.backends.triton.losses.math import softplus_and_sigmoid
from unitsface_kernels.backends.triton.losses.policy import SumTermsPolicy


@triton.jit
def term(cosine, threshold, positive, params, variables):
    loss_weight_times_alpha = params[0]  # loss_weight * alpha
    k1 = params[1]  # loss_weight * (1 - alpha)
    k2 = params[2]  # b_theta * 1 / r
    k3 = params[3]  # margin * 1 / r
    k4 = params[4]  # 1 / r
    r = params[5]
    r_times_margin = params[6]  # r * margin
    b_theta_times_r = params[7]  # b_theta * r
    k8 = params[8]  # -1 / r
    k9 = params[9]  # -1 / r * loss_weight * alpha
    k10 = params[10]  # loss_weight * (1 - alpha) * r
    k11 = params[11]  # loss_weight * alpha * 1 / r * b_theta
    k12 = params[12]  # -r * b_theta * loss_weight * (1 - alpha)
    x0 = 1.0 / variables[0]
    x1 = 1.0 / variables[1]
    x2 = tl.where(positive, x0, x1)
    x3 = variables[2] * variables[3]
    x4 = k2 * x3 + k3 - k4 * threshold
    x5 = r * threshold + r_times_margin - b_theta_times_r * x3
    x6 = tl.where(positive, x4, x5) + tl.where(positive, k8, r) * cosine
    part0 = softplus_and_sigmoid(x6)
    x7 = tl.where(positive, k9, k10) * (part0[1] * x2)
    part1 = softplus_and_sigmoid(x4 - k4 * cosine)
    part2 = softplus_and_sigmoid(r * cosine + x5)
    x8 = tl.where(positive, k11, k12)
    value = tl.where(positive, loss_weight_times_alpha, k1) * (x2 * part0[0])
    slope0 = tl.where(positive, -(loss_weight_times_alpha * (x0 / variables[0] * part1[0])), 0.0)
    slope1 = tl.where(positive, 0.0, -(k1 * (x1 / variables[1] * part2[0])))
    slope2 = x8 * (x2 * (part0[1] * variables[3]))
    slope3 = x8 * (x2 * (part0[1] * variables[2]))
    return value, x7, x7, slope0, slope1, slope2, slope3


POLICY = SumTermsPolicy(term, heavy=True)
