// What a pair adds to the sums of a `sum` loss.
#pragma once

#include <stdexcept>

#include "unitsface/policy.h"

namespace unitsface::cuda {

struct PairTerms {
  float row_loss, column_loss, gradient, row_dthreshold, column_dthreshold;
};

struct PairWeights {
  float row;     // of the pair as one of row i
  float mirror;  // of the pair as one of row j, in the gradient
  float other;   // the same, in the threshold's gradient
};

// Whether the two directions of a pair have thresholds of their own.
template <class Args>
bool separate_thresholds(const Args& args) {
  return args.per_column && (args.mirrored || args.b_loss != nullptr);
}

// The same. Throws std::invalid_argument if those of the loss have not: kernels for them are not
// compiled.
template <class Policy, class Args>
bool separate_thresholds_of(const Args& args) {
  const bool separate = separate_thresholds(args);
  if (separate && !Policy::kRowThresholds) {
    throw std::invalid_argument("rows of this loss have no threshold of their own");
  }
  return separate;
}

// kSeparate: see separate_thresholds().
template <bool kSeparate, class Policy>
UF_HOST_DEVICE PairTerms evaluate_pair(const Policy& policy, float cosine, bool positive,
                                       float column_threshold, float row_threshold,
                                       const PairWeights& weights) {
  const Term row = policy.evaluate(cosine, column_threshold, positive);
  if (!kSeparate) {
    return {row.value, row.value, (weights.row + weights.mirror) * row.dcosine, 0.0f,
            (weights.row + weights.other) * row.dthreshold};
  }
  const Term column = policy.evaluate(cosine, row_threshold, positive);
  return {row.value, column.value, weights.row * row.dcosine + weights.mirror * column.dcosine,
          weights.other * column.dthreshold, weights.row * row.dthreshold};
}

}  // namespace unitsface::cuda
