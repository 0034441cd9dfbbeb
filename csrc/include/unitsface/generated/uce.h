// Generated from losses/uce.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// UCE: softplus over samples and classes.
// positive = scale * (cosine - (margin + adaptive_margin * detach(cosine))) - threshold
// negative = scale * cosine - threshold
struct UCE {
  static constexpr int kParameters = 5;
  static constexpr bool kRowThresholds = false;
  static constexpr float kThresholdSlope = -1.0f;
  static constexpr bool kWeighted = true;
  static constexpr bool kUniformSlope = true;
  float k0;  // scale * (1 - adaptive_margin)
  float scale;
  float margin_times_scale;  // margin * scale
  float negative_weight;
  float k4;  // -scale * (1 - adaptive_margin)

  UF_HOST_DEVICE explicit UCE(const float* p)
      : k0(p[0]), scale(p[1]), margin_times_scale(p[2]), negative_weight(p[3]), k4(p[4]) {}

  UF_HOST_DEVICE Term evaluate(float cosine, float threshold, bool positive) const {
    const float x0 = (positive ? threshold + margin_times_scale : -threshold);
    const float x1 = x0 + (positive ? k4 : scale) * cosine;
    const auto part0 = softplus(x1);
    const float x2 = (positive ? -1.0f : negative_weight) * part0.sigmoid;
    return {(positive ? 1.0f : negative_weight) * part0.value, x2 * scale, -x2};
  }

  UF_HOST_DEVICE Logit logit(float cosine, float threshold, bool positive) const {
    const float x0 = (positive ? threshold + margin_times_scale : threshold);
    return {(positive ? k0 : scale) * cosine - x0, scale};
  }

  UF_HOST_DEVICE float weight(bool positive) const { return positive ? 1.0f : negative_weight; }
};

}  // namespace UF_ISA
}  // namespace unitsface
