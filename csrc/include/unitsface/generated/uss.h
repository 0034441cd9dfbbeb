// Generated from losses/uss.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// USS: softplus over pairs of samples.
// positive = scale * (cosine - margin) - threshold
// negative = scale * cosine - threshold
struct USS {
  static constexpr int kParameters = 2;
  static constexpr bool kRowThresholds = true;
  static constexpr float kThresholdSlope = -1.0f;
  static constexpr bool kWeighted = false;
  static constexpr bool kUniformSlope = true;
  float scale;
  float margin_times_scale;  // margin * scale

  UF_HOST_DEVICE explicit USS(const float* p) : scale(p[0]), margin_times_scale(p[1]) {}

  UF_HOST_DEVICE Term evaluate(float cosine, float threshold, bool positive) const {
    const float x0 = scale * cosine;
    const float x1 = (positive ? threshold + margin_times_scale - x0 : x0 - threshold);
    const auto part0 = softplus(x1);
    const float x2 = (positive ? -part0.sigmoid : part0.sigmoid);
    return {part0.value, x2 * scale, -x2};
  }

  UF_HOST_DEVICE Logit logit(float cosine, float threshold, bool positive) const {
    const float value = scale * cosine - (positive ? threshold + margin_times_scale : threshold);
    return {value, scale};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
