// Generated from losses/mv_softmax.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// MVSoftmax: logsumexp over samples and classes.
// x0 = cos(margin)
// x1 = sin(margin)
// x2 = where(margin_type == "am", cosine - margin, cosine * x0 - sine(cosine) * x1)
// x3 = target_cosine * x0 - sine(target_cosine) * x1
// is0 = where(margin_type == "am", target_cosine - margin, x3) < cosine
// x4 = cosine + (where(weighting == "adaptive", t, 0) * cosine + t)
// positive = scale * where(margin_at == "all" | (cosine > 0), x2, cosine)
// negative = scale * where(is0, x4, cosine)
struct MVSoftmax {
  static constexpr int kParameters = 9;
  static constexpr int kScalars = 0, kRows = 1, kColumns = 0;
  // v: target_cosine.
  unsigned margin_at_is_all;  // margin_at == "all"
  float margin;
  float cos_margin;            // cos(margin)
  float sin_margin;            // sin(margin)
  unsigned margin_type_is_am;  // margin_type == "am"
  float scale;
  float k6;  // where(weighting == "adaptive", t, 0) + 1
  float t;
  float k8;  // 1 + where(weighting == "adaptive", t, 0)

  UF_HOST_DEVICE explicit MVSoftmax(const float* p)
      : margin_at_is_all(all_bits(p[0] != 0.0f)),
        margin(p[1]),
        cos_margin(p[2]),
        sin_margin(p[3]),
        margin_type_is_am(all_bits(p[4] != 0.0f)),
        scale(p[5]),
        k6(p[6]),
        t(p[7]),
        k8(p[8]) {}

  UF_HOST_DEVICE WithSlopes<Logit, 1> negative(float cosine, const Values<1>& v) const {
    const float x0 = cos_margin * v.value[0] - sin_margin * sine_of_cosine(v.value[0]);
    const bool is0 = choose(margin_type_is_am, v.value[0] - margin, x0) < cosine;
    return {{scale * (is0 ? k6 * cosine + t : cosine), scale * (is0 ? k8 : 1.0f)}, {0.0f}};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
