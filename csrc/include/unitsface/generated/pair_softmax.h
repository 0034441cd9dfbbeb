// Generated from losses/pair_softmax.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// PairSoftmax: logsumexp over pairs of samples.
// positive = scale * (cosine - margin)
// negative = scale * cosine
struct PairSoftmax {
  static constexpr int kParameters = 2;
  static constexpr bool kPositives = true;
  float scale;
  float margin_times_scale;  // margin * scale

  UF_HOST_DEVICE explicit PairSoftmax(const float* p) : scale(p[0]), margin_times_scale(p[1]) {}

  UF_HOST_DEVICE Logit positive(float cosine) const {
    return {scale * cosine - margin_times_scale, scale};
  }

  UF_HOST_DEVICE Logit negative(float cosine) const { return {scale * cosine, scale}; }
};

}  // namespace UF_ISA
}  // namespace unitsface
