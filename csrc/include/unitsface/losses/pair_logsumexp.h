// Log-sum-exp over a row's negatives with a cosine in [lower, upper].
#pragma once

#include <math.h>

#include "../policy.h"

namespace unitsface {
inline namespace UF_ISA {

struct PairLogsumexp {
  static constexpr int kParameters = 3;
  static constexpr bool kPositives = false;
  float scale, lower, upper;

  UF_HOST_DEVICE explicit PairLogsumexp(const float* p) : scale(p[0]), lower(p[1]), upper(p[2]) {}

  UF_HOST_DEVICE Logit negative(float cosine) const {
    // False for NaN, which is kept.
    const bool outside = (cosine < lower) | (cosine > upper);
    return {outside ? -INFINITY : scale * cosine, outside ? 0.0f : scale};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
