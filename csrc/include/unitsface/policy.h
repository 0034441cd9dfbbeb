// The contract between drivers and losses.
//
// A policy is a struct built from a float array, the constants of its loss's formula in the order
// of policy/form.py (LossSpec.kernel_params), with
//
//   static constexpr int kParameters;
//
// and, if its pairs are summed,
//
//   Term evaluate(float cosine, float threshold, bool positive) const;
//
// or, if they meet in a log-sum-exp,
//
//   Logit positive(float cosine) const;   // called once per row
//   Logit negative(float cosine) const;   // called for every pair
//
// with one positive per row (classes), or with any number of them (samples), which may have a
// log-sum-exp of their own,
//
//   static constexpr bool kPositives;     // false: positive pairs take no part
//   Logit positive(float cosine) const;   // called for every pair; absent without kPositives
//   Logit negative(float cosine) const;   // called for every pair; {-inf, 0} leaves one out
//
// A `nearest` loss has no policy: nearest_tile is the search for all of them, and the formula runs
// on k numbers per row, as tensor operations in Python.
//
// Functions called for every pair must not branch or call the C library, so that they vectorize.
// Every function is UF_HOST_DEVICE and const. A policy is listed in loss_list.def.
#pragma once

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

}  // namespace unitsface
