// Logits of pairs of samples, of policies with variables and of those without.
#pragma once

#include <cstdint>

#include "cpu/variables.h"
#include "unitsface/pair_logit.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// The logit of a positive pair, or of a negative one, for which `v` are variables of `row` and
// `column`.
template <class Policy>
UF_HOST_DEVICE auto positive_at(const Policy& policy, float cosine, const Variables<Policy>& v,
                                int64_t row, int64_t column) {
  if constexpr (VariablesOf<Policy>::kCount > 0) {
    return policy.positive(cosine, v.at(row, column));
  } else {
    return policy.positive(cosine);
  }
}

template <class Policy>
UF_HOST_DEVICE auto negative_at(const Policy& policy, float cosine, const Variables<Policy>& v,
                                int64_t row, int64_t column) {
  if constexpr (VariablesOf<Policy>::kCount > 0) {
    return policy.negative(cosine, v.at(row, column));
  } else {
    return policy.negative(cosine);
  }
}

// That of a pair of either kind.
template <class Policy>
UF_HOST_DEVICE auto logit_at(const Policy& policy, float cosine, bool positive,
                             const Variables<Policy>& v, int64_t row, int64_t column) {
  if constexpr (VariablesOf<Policy>::kCount == 0) {
    return pair_logit(policy, cosine, positive);
  } else {
    auto z = negative_at(policy, cosine, v, row, column);
    if constexpr (Policy::kPositives) {
      const auto other = positive_at(policy, cosine, v, row, column);
      z.value = positive ? other.value : z.value;
      z.dcosine = positive ? other.dcosine : z.dcosine;
      each<VariablesOf<Policy>::kCount>(
          [&](auto k) { z.slope[k] = positive ? other.slope[k] : z.slope[k]; });
    }
    return z;
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
