// Generated from losses/clip.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// CLIP: logsumexps over pairs of samples.
// x0 = scale * cosine
// positive = x0
// negative = x0
// finish = softplus(negatives - positives)
struct CLIP {
  static constexpr int kParameters = 0;
  static constexpr bool kPositives = true;
  static constexpr int kScalars = 1, kRows = 0, kColumns = 0;
  // v: scale.

  UF_HOST_DEVICE explicit CLIP(const float*) {}

  UF_HOST_DEVICE WithSlopes<Logit, 1> positive(float cosine, const Values<1>& v) const {
    return {{v.value[0] * cosine, v.value[0]}, {cosine}};
  }

  UF_HOST_DEVICE WithSlopes<Logit, 1> negative(float cosine, const Values<1>& v) const {
    return {{v.value[0] * cosine, v.value[0]}, {cosine}};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
