// Generated from losses/siglip.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// SigLIP: softplus over pairs of samples.
// x0 = scale * cosine - threshold
// positive = x0
// negative = x0
struct SigLIP {
  static constexpr int kParameters = 0;
  static constexpr bool kRowThresholds = true;
  static constexpr int kScalars = 1, kRows = 0, kColumns = 0;
  // v: scale.

  UF_HOST_DEVICE explicit SigLIP(const float*) {}

  UF_HOST_DEVICE WithSlopes<Term, 1> evaluate(float cosine, float threshold, bool positive,
                                              const Values<1>& v) const {
    const float x0 = v.value[0] * cosine;
    const float x1 = (positive ? threshold - x0 : x0 - threshold);
    const auto part0 = softplus(x1);
    const float x2 = (positive ? -part0.sigmoid : part0.sigmoid);
    return {{part0.value, x2 * v.value[0], -x2}, {x2 * cosine}};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
