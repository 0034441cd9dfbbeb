// The contract between drivers and losses.
//
// A policy is a struct built from a float array, the constants of its loss's formula in the order
// of policy/form.py (LossSpec.kernel_params), with
//
//   static constexpr int kParameters;
//
// and, if its pairs are summed,
//
//   static constexpr bool kRowThresholds;   // whether rows can have a threshold of their own
//   Term evaluate(float cosine, float threshold, bool positive) const;
//
// where the term is a weight times the softplus of z for a negative, of -z for a positive, also
//
//   static constexpr float kThresholdSlope;   // d z / d threshold: -1, 0 or 1
//   static constexpr bool kWeighted;          // false: weights are 1, and there is no weight()
//   static constexpr bool kUniformSlope;      // d z / d cosine is the same for all pairs
//   Logit logit(float cosine, float threshold, bool positive) const;   // z
//   float weight(bool positive) const;
//
// or, if they meet in a log-sum-exp,
//
//   Logit positive(float cosine) const;   // called once per row
//   Logit negative(float cosine) const;   // called for every pair; {-inf, 0} leaves one out
//
// with one positive per row (classes), or with any number of them (samples), which may have a
// log-sum-exp of their own,
//
//   static constexpr bool kPositives;     // false: positive pairs take no part
//   Logit positive(float cosine) const;   // called for every pair; absent without kPositives
//   Logit negative(float cosine) const;
//
// A policy may read tensors, its variables: numbers that are one for all pairs, one per row, or one
// per column. It has
//
//   static constexpr int kScalars, kRows, kColumns;   // absent: 0
//
// evaluate and negative then take `const Values<kVariables>& v` last, the values in this order, and
// return their results with derivatives by each, as WithSlopes<Term, ...> and WithSlopes<Logit,
// ...>. Of a pair in the other direction, values of rows are those of the column and vice versa.
//
// A `nearest` loss has no policy: nearest_tile is the search for all of them, and the formula runs
// on k numbers per row, as tensor operations in Python.
//
// Functions called for every pair must not branch or call the C library, so that they vectorize.
// Every function is UF_HOST_DEVICE and const. A policy is listed in loss_list.def.
#pragma once

#include <type_traits>
#include <utility>

#include "macros.h"

namespace unitsface {

struct Term {
  float value;       // loss of this pair
  float dcosine;     // d value / d cosine
  float dthreshold;  // d value / d threshold
};

struct Logit {
  float value;
  float dcosine;  // d value / d cosine
};

// An array is indexed by constants alone, so that it is a set of registers. None is empty.
template <int kCount>
struct Values {
  float value[kCount > 0 ? kCount : 1];
};

template <class Result, int kCount>
struct WithSlopes : Result {
  float slope[kCount];  // d value / d variable
};

// Numbers of a policy's variables, in the order of their values.
template <class Policy, class = void>
struct VariablesOf {
  static constexpr int kScalars = 0, kRows = 0, kColumns = 0, kCount = 0;
};

template <class Policy>
struct VariablesOf<Policy, std::void_t<decltype(Policy::kScalars)>> {
  static constexpr int kScalars = Policy::kScalars, kRows = Policy::kRows,
                       kColumns = Policy::kColumns, kCount = kScalars + kRows + kColumns;
};

// Whether the policy has the logit of a positive: else, where it reads variables, the driver has
// it.
template <class Policy, class = void>
constexpr bool kHasPositive = false;
template <class Policy>
constexpr bool kHasPositive<Policy, std::void_t<decltype(std::declval<Policy>().positive(0.0f))>> =
    true;

// Whether the policy's term is a softplus of a logit that is linear in the cosine.
template <class Policy, class = void>
constexpr bool kLinearLogit = false;
template <class Policy>
constexpr bool kLinearLogit<Policy, std::void_t<decltype(Policy::kUniformSlope)>> =
    Policy::kUniformSlope;

}  // namespace unitsface
