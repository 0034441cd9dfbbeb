// Generated from losses/pair_logsumexp.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// PairLogsumexp: logsumexp over pairs of samples.
// negative = where((cosine < lower) | (upper < cosine), -inf, scale * cosine)
struct PairLogsumexp {
  static constexpr int kParameters = 3;
  static constexpr bool kPositives = false;
  float lower;
  float upper;
  float scale;

  UF_HOST_DEVICE explicit PairLogsumexp(const float* p) : lower(p[0]), upper(p[1]), scale(p[2]) {}

  UF_HOST_DEVICE Logit negative(float cosine) const {
    const bool is0 = (cosine < lower) | (upper < cosine);
    return {(is0 ? -INFINITY : scale * cosine), (is0 ? 0.0f : scale)};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
