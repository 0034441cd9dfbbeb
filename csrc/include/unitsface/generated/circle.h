// Generated from losses/circle.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// Circle: logsumexps over pairs of samples.
// positive = -(scale * detach(max(1 + margin - cosine, 0)) * (cosine - (1 - margin)))
// negative = scale * detach(max(cosine + margin, 0)) * (cosine - margin)
// finish = softplus(positives + negatives)
struct Circle {
  static constexpr int kParameters = 4;
  static constexpr bool kPositives = true;
  float k0;  // 1 + margin
  float k1;  // margin - 1
  float scale;
  float margin;

  UF_HOST_DEVICE explicit Circle(const float* p) : k0(p[0]), k1(p[1]), scale(p[2]), margin(p[3]) {}

  UF_HOST_DEVICE Logit positive(float cosine) const {
    const float x0 = k0 - cosine;
    const float x1 = (x0 < 0.0f ? 0.0f : x0);
    return {-(scale * (x1 * (cosine + k1))), -(scale * x1)};
  }

  UF_HOST_DEVICE Logit negative(float cosine) const {
    const float x0 = cosine + margin;
    const float x1 = (x0 < 0.0f ? 0.0f : x0);
    return {scale * (x1 * (cosine - margin)), scale * x1};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
