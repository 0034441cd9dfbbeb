// Pairs of samples in losses of log-sum-exps: their two kinds, and their gradient.
#pragma once

#include <cstdint>

#include "unitsface/pair_logit.h"
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

// What a row, or a column, gives to the gradients of its pairs.
struct alignas(16) PairSide {
  float log_negatives, negative_weight, positive_weight, log_positives;
};

// d loss / d cosine of a pair that counts. kTwo: there is a log-sum-exp of positives; kBoth: the
// pair is one of its column, too.
template <bool kTwo, bool kBoth, class Policy>
UF_HOST_DEVICE float pair_gradient(const Policy& policy, float cosine, bool same,
                                   const PairSide& row, const PairSide& column) {
  const Logit z = pair_logit(policy, cosine, same);
  float slope;
  if (kTwo) {
    slope = pair_slope_of_two(z.value, same, row.log_negatives, row.log_positives,
                              row.negative_weight, row.positive_weight);
    if (kBoth)
      slope += pair_slope_of_two(z.value, same, column.log_negatives, column.log_positives,
                                 column.negative_weight, column.positive_weight);
  } else {
    slope = pair_slope(z.value - row.log_negatives, same, row.negative_weight, row.positive_weight);
    if (kBoth)
      slope += pair_slope(z.value - column.log_negatives, same, column.negative_weight,
                          column.positive_weight);
  }
  return slope * z.dcosine;
}

}  // namespace unitsface::cuda
