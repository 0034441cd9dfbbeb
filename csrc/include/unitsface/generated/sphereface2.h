// Generated from losses/sphereface2.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// SphereFace2: softplus over samples and classes.
// x0 = where(margin_type == "A", margin, 0)
// x1 = cos(x0)
// x2 = (where(cosine < -x1, -1, cosine * x1 - sine(cosine) * sin(x0)) + 1) / 2
// x3 = 2 * pow(x2, t) - 1
// x4 = where(margin_type == "A", 0, margin)
// x5 = where(margin_gradient == "exact", x3, cosine + detach(x3 - cosine)) - x4
// x6 = 2 * pow((cosine + 1) / 2, t) - 1
// x7 = where(margin_gradient == "exact", x6, cosine + detach(x6 - cosine)) + x4
// x8 = loss_weight / scale
// positive = scale * x5 + threshold
// negative = scale * x7 + threshold
// positive_weight = x8 * alpha
// negative_weight = x8 * (1 - alpha)
struct SphereFace2 {
  static constexpr int kParameters = 14;
  static constexpr bool kRowThresholds = false;
  static constexpr float kThresholdSlope = 1.0f;
  static constexpr bool kWeighted = true;
  static constexpr bool kUniformSlope = false;
  float k0;  // -cos(where(margin_type == "A", margin, 0))
  float k1;  // cos(where(margin_type == "A", margin, 0))
  float k2;  // sin(where(margin_type == "A", margin, 0))
  float t;
  float k4;                           // scale * 2
  float k5;                           // (where(margin_type == "A", 0, margin) + 1) * scale
  float k6;                           // scale * (where(margin_type == "A", 0, margin) - 1)
  float k7;                           // 2 * t * 0.5
  unsigned margin_gradient_is_exact;  // margin_gradient == "exact"
  float scale;
  float k10;  // loss_weight / scale * alpha
  float k11;  // loss_weight / scale * (1 - alpha)
  float k12;  // -scale * 2
  float k13;  // -loss_weight / scale * alpha

  UF_HOST_DEVICE explicit SphereFace2(const float* p)
      : k0(p[0]),
        k1(p[1]),
        k2(p[2]),
        t(p[3]),
        k4(p[4]),
        k5(p[5]),
        k6(p[6]),
        k7(p[7]),
        margin_gradient_is_exact(all_bits(p[8] != 0.0f)),
        scale(p[9]),
        k10(p[10]),
        k11(p[11]),
        k12(p[12]),
        k13(p[13]) {}

  UF_HOST_DEVICE Term evaluate(float cosine, float threshold, bool positive) const {
    const bool is0 = cosine < k0;
    const float x0 = sine_of_cosine(cosine);
    const float x1 = choose(all_bits(is0), -1.0f, k1 * cosine - k2 * x0);
    const float x2 = 0.5f * choose(all_bits(positive), x1, cosine) + 0.5f;
    const float x3 = pow_positive(x2, t);
    const float x4 = (positive ? k5 - threshold : threshold + k6) + (positive ? k12 : k4) * x3;
    const auto part0 = softplus(x4);
    const float x5 = (positive ? k13 : k11) * part0.sigmoid;
    const float x6 = (is0 ? 0.0f : k2 * (cosine / (x0 < 0.0001f ? 0.0001f : x0)) + k1);
    const float x7 = k7 * (x3 / (x2 < 1e-30f ? 1e-30f : x2) * (positive ? x6 : 1.0f));
    const float value = (positive ? k10 : k11) * part0.value;
    const float dcosine = x5 * (scale * choose(margin_gradient_is_exact, x7, 1.0f));
    return {value, dcosine, x5};
  }

  UF_HOST_DEVICE Logit logit(float cosine, float threshold, bool positive) const {
    const bool is0 = cosine < k0;
    const float x0 = sine_of_cosine(cosine);
    const float x1 = choose(all_bits(is0), -1.0f, k1 * cosine - k2 * x0);
    const float x2 = 0.5f * choose(all_bits(positive), x1, cosine) + 0.5f;
    const float x3 = pow_positive(x2, t);
    const float x4 = (is0 ? 0.0f : k2 * (cosine / (x0 < 0.0001f ? 0.0001f : x0)) + k1);
    const float x5 = k7 * (x3 / (x2 < 1e-30f ? 1e-30f : x2) * (positive ? x4 : 1.0f));
    const float value = k4 * x3 + (positive ? threshold - k5 : threshold + k6);
    const float dcosine = scale * choose(margin_gradient_is_exact, x5, 1.0f);
    return {value, dcosine};
  }

  UF_HOST_DEVICE float weight(bool positive) const { return positive ? k10 : k11; }
};

}  // namespace UF_ISA
}  // namespace unitsface
