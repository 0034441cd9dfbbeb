// Generated from losses/simple_pairs.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// SimPLE: softplus over pairs of samples.
// x0 = cosine - b_theta * row_norm * column_norm
// positive = (x0 - margin + threshold) / r
// negative = (x0 + margin + threshold) * r
// positive_weight = loss_weight * alpha / positives_per_row
// negative_weight = loss_weight * (1 - alpha) / negatives_per_row
struct SimPLE {
  static constexpr int kParameters = 13;
  static constexpr bool kRowThresholds = true;
  static constexpr int kScalars = 2, kRows = 1, kColumns = 1;
  // v: positives_per_row, negatives_per_row, row_norm, column_norm.
  float loss_weight_times_alpha;  // loss_weight * alpha
  float k1;                       // loss_weight * (1 - alpha)
  float k2;                       // b_theta * 1 / r
  float k3;                       // margin * 1 / r
  float k4;                       // 1 / r
  float r;
  float r_times_margin;   // r * margin
  float b_theta_times_r;  // b_theta * r
  float k8;               // -1 / r
  float k9;               // -1 / r * loss_weight * alpha
  float k10;              // loss_weight * (1 - alpha) * r
  float k11;              // loss_weight * alpha * 1 / r * b_theta
  float k12;              // -r * b_theta * loss_weight * (1 - alpha)

  UF_HOST_DEVICE explicit SimPLE(const float* p)
      : loss_weight_times_alpha(p[0]),
        k1(p[1]),
        k2(p[2]),
        k3(p[3]),
        k4(p[4]),
        r(p[5]),
        r_times_margin(p[6]),
        b_theta_times_r(p[7]),
        k8(p[8]),
        k9(p[9]),
        k10(p[10]),
        k11(p[11]),
        k12(p[12]) {}

  UF_HOST_DEVICE WithSlopes<Term, 4> evaluate(float cosine, float threshold, bool positive,
                                              const Values<4>& v) const {
    const float x0 = 1.0f / v.value[0];
    const float x1 = 1.0f / v.value[1];
    const float x2 = (positive ? x0 : x1);
    const float x3 = v.value[2] * v.value[3];
    const float x4 = k2 * x3 + k3 - k4 * threshold;
    const float x5 = r * threshold + r_times_margin - b_theta_times_r * x3;
    const float x6 = (positive ? x4 : x5) + (positive ? k8 : r) * cosine;
    const auto part0 = softplus(x6);
    const float x7 = (positive ? k9 : k10) * (part0.sigmoid * x2);
    const auto part1 = softplus(x4 - k4 * cosine);
    const float x8 = -(loss_weight_times_alpha * (x0 / v.value[0] * part1.value));
    const auto part2 = softplus(r * cosine + x5);
    const float x9 = (positive ? k11 : k12);
    const float value = (positive ? loss_weight_times_alpha : k1) * (x2 * part0.value);
    const float slope0 = (positive ? x8 : 0.0f);
    const float slope1 = (positive ? 0.0f : -(k1 * (x1 / v.value[1] * part2.value)));
    const float slope2 = x9 * (x2 * (part0.sigmoid * v.value[3]));
    const float slope3 = x9 * (x2 * (part0.sigmoid * v.value[2]));
    return {{value, x7, x7}, {slope0, slope1, slope2, slope3}};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
