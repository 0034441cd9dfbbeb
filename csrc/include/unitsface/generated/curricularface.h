// Generated from losses/curricularface.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// CurricularFace: logsumexp over samples and classes.
// x0 = cos(margin)
// x1 = sin(margin)
// x2 = where(-x0 < cosine, cosine * x0 - sine(cosine) * x1, cosine - margin * x1)
// is0 = target_cosine * x0 - sine(target_cosine) * x1 < cosine
// positive = scale * x2
// negative = scale * where(is0, cosine * (t + cosine), cosine)
struct CurricularFace {
  static constexpr int kParameters = 5;
  static constexpr int kScalars = 1, kRows = 1, kColumns = 0;
  // v: t, target_cosine.
  float minus_cos_margin;  // -cos(margin)
  float cos_margin;        // cos(margin)
  float sin_margin;        // sin(margin)
  float k3;                // margin * sin(margin)
  float scale;

  UF_HOST_DEVICE explicit CurricularFace(const float* p)
      : minus_cos_margin(p[0]), cos_margin(p[1]), sin_margin(p[2]), k3(p[3]), scale(p[4]) {}

  UF_HOST_DEVICE WithSlopes<Logit, 2> negative(float cosine, const Values<2>& v) const {
    const bool is0 = cos_margin * v.value[1] - sin_margin * sine_of_cosine(v.value[1]) < cosine;
    const float value = scale * (is0 ? cosine * (cosine + v.value[0]) : cosine);
    const float dcosine = scale * (is0 ? 2.0f * cosine + v.value[0] : 1.0f);
    const float slope0 = scale * (is0 ? cosine : 0.0f);
    return {{value, dcosine}, {slope0, 0.0f}};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
