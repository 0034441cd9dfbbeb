// Gradient of a pair in a log-sum-exp loss over samples, shared by all backends.
#pragma once

#include "policy.h"
#include "scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

template <class Policy>
UF_HOST_DEVICE Logit pair_logit(const Policy& policy, float cosine, bool positive) {
  const Logit negative = policy.negative(cosine);
  if constexpr (Policy::kPositives) {
    const Logit other = policy.positive(cosine);
    return {positive ? other.value : negative.value, positive ? other.dcosine : negative.dcosine};
  }
  return negative;
}

// d loss / d logit of one direction of a pair, for gap = z - N of its row: of a negative
// weight e^gap, of a positive -weight sigmoid(-gap). One exponential serves both.
UF_HOST_DEVICE float pair_slope(float gap, bool positive, float negative_weight,
                                float positive_weight) {
  const float e = exp_clamped(gap);
  return positive ? -divide_by_unit(positive_weight, 1.0f + e) : negative_weight * e;
}

// The same with a log-sum-exp of positives, too: weight e^gap, for gap = z - that of its kind.
UF_HOST_DEVICE float pair_slope_of_two(float z, bool positive, float log_negatives,
                                       float log_positives, float negative_weight,
                                       float positive_weight) {
  return (positive ? positive_weight : negative_weight) *
         exp_clamped(z - (positive ? log_positives : log_negatives));
}

}  // namespace UF_ISA
}  // namespace unitsface
