// The two kinds of pairs of samples that log-sum-exps are over.
#pragma once

#include <cstdint>

#include "unitsface/policy.h"

namespace unitsface::cuda {

// Whether a pair is of the kind that a log-sum-exp is over.
template <bool kPositive>
UF_HOST_DEVICE bool is_of_kind(int64_t label, int64_t other) {
  return label >= 0 && other >= 0 && (label == other) == kPositive;
}

template <bool kPositive, class Policy>
UF_HOST_DEVICE float logit_of_kind(const Policy& policy, float cosine) {
  if constexpr (kPositive) {
    return policy.positive(cosine).value;
  } else {
    return policy.negative(cosine).value;
  }
}

}  // namespace unitsface::cuda
