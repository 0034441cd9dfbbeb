// Sums of the losses of pairs. Those of a softplus take one logarithm for many pairs,
// sum log(1 + e) = log prod(1 + e).
#pragma once

#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/units.h"
#include "cpu/variables.h"
#include "unitsface/policy.h"
#include "unitsface/scalar_math.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// Factors of a product at most. Each is at most 2: a product stays far below the largest float.
constexpr int32_t kFactors = 64;
static_assert(kRowsPerUnit <= kFactors, "the products of a column have a factor per row");

// Products that the sum of a policy's terms takes: one for each weight of its softplus, none of
// terms of another form.
template <class Policy, class = void>
constexpr int kProducts = 0;
template <class Policy>
constexpr int kProducts<Policy, std::void_t<decltype(Policy::kWeighted)>> =
    Policy::kWeighted ? 2 : 1;

// A pair's term. The value of a softplus is without its logarithm, weight * log(1 + e); e is at the
// place of the weight, and 0 at the other. Arrays have an element more than is used: none is empty.
template <class Policy>
struct PairTerm : Term {
  float exponential[kProducts<Policy> + 1];
  float slope[VariablesOf<Policy>::kCount + 1];
};

template <class Policy>
UF_HOST_DEVICE PairTerm<Policy> pair_term(const Policy& policy, float cosine, float threshold,
                                          bool positive,
                                          const Values<VariablesOf<Policy>::kCount>& v) {
  constexpr int kVariables = VariablesOf<Policy>::kCount;
  if constexpr (kVariables > 0) {
    const auto term = policy.evaluate(cosine, threshold, positive, v);
    PairTerm<Policy> pair{term, {}, {}};
    each<kVariables>([&](auto k) { pair.slope[k] = term.slope[k]; });
    return pair;
  } else if constexpr (kProducts<Policy> == 0) {
    return {policy.evaluate(cosine, threshold, positive), {}, {}};
  } else {
    const Logit z = policy.logit(cosine, threshold, positive);
    const Softplus loss = softplus(positive ? -z.value : z.value);
    float weight = 1.0f;
    if constexpr (Policy::kWeighted) weight = policy.weight(positive);
    const float slope = weight * (positive ? -loss.sigmoid : loss.sigmoid);
    const bool second = Policy::kWeighted && positive;
    return {{weight * loss.top, slope * z.dcosine, slope * Policy::kThresholdSlope},
            {second ? 0.0f : loss.exponential, second ? loss.exponential : 0.0f},
            {}};
  }
}

// Not inlined: all policies share it.
UF_SHARED inline void add_logarithms(float* __restrict values, const float* __restrict products,
                                     float weight, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] += weight * log1p_positive(products[i]);
}

// Sums of rows or columns, or of the lanes of a row.
template <class Policy>
struct LossSums {
  float* values;
  float* products;  // [kProducts, stride], of 1 + e, less 1: small ones keep their digits
  int64_t stride;

  UF_HOST_DEVICE void add(int64_t place, const PairTerm<Policy>& pair, bool valid) const {
    values[place] += valid ? pair.value : 0.0f;
    each<kProducts<Policy>>([&](auto p) {
      float& product = products[p * stride + place];
      const float e = valid ? pair.exponential[p] : 0.0f;
      product = product * e + (product + e);
    });
  }

  // Adds the weighted logarithms of the products of `count` places to their values.
  void add_logarithms(const Policy& policy, int64_t count) const {
    if constexpr (kProducts<Policy> == 1) {
      cpu::add_logarithms(values, products, 1.0f, count);
    } else {
      cpu::add_logarithms(values, products, policy.weight(false), count);
      cpu::add_logarithms(values, products + stride, policy.weight(true), count);
    }
  }
};

// Sum of the losses of a row's pairs, each of which add_pair(column, lane, sums) adds to the
// lane's.
template <class Policy, class AddPair>
UF_HOST_DEVICE float sum_of_row(const Policy& policy, int32_t columns, const AddPair& add_pair) {
  float values[kLanes] = {};
  for (int32_t j = 0; j < columns;) {
    float products[(kProducts<Policy> + 1) * kLanes] = {};
    const LossSums<Policy> sums{values, products, kLanes};
    const int32_t left = columns - j, most = kFactors * kLanes;
    const int32_t stop = j + (left < most ? left : most);
    each_lane(j, stop,
              [&](int32_t column, int32_t lane) UF_INLINED { add_pair(column, lane, sums); });
    j = stop;
    if constexpr (kProducts<Policy> > 0) sums.add_logarithms(policy, kLanes);
  }
  return sum_of(values, kLanes);
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
