// Generated from losses/multi_similarity.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// MultiSimilarity: logsumexps over pairs of samples.
// x0 = cosine - base
// positive = -(alpha * x0)
// negative = beta * x0
// finish = softplus(positives) / alpha + softplus(negatives) / beta
struct MultiSimilarity {
  static constexpr int kParameters = 5;
  static constexpr bool kPositives = true;
  float alpha;
  float base_times_alpha;  // base * alpha
  float beta;
  float base_times_beta;  // base * beta
  float minus_alpha;      // -alpha

  UF_HOST_DEVICE explicit MultiSimilarity(const float* p)
      : alpha(p[0]), base_times_alpha(p[1]), beta(p[2]), base_times_beta(p[3]), minus_alpha(p[4]) {}

  UF_HOST_DEVICE Logit positive(float cosine) const {
    return {base_times_alpha - alpha * cosine, minus_alpha};
  }

  UF_HOST_DEVICE Logit negative(float cosine) const {
    return {beta * cosine - base_times_beta, beta};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
