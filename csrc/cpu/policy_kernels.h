// The kernels of a policy, by the way in which its pairs combine.
#pragma once

#include "cpu/denormals.h"
#include "cpu/logsumexp_pairs_gradient_tile.h"
#include "cpu/logsumexp_pairs_tile.h"
#include "cpu/logsumexp_tile.h"
#include "cpu/loss_kernels.h"
#include "cpu/sum_tile.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

template <class Policy, class Args, void (*kKernel)(const Policy, const Args&, int)>
void with_policy(const float* params, const Args& t, int threads) {
  [[maybe_unused]] const FlushDenormals flush{};
  kKernel(Policy(params), t, threads);
}

template <class Policy>
constexpr LossKernels numbers_of() {
  using V = VariablesOf<Policy>;
  LossKernels k{};
  k.parameters = Policy::kParameters;
  k.scalars = V::kScalars;
  k.rows = V::kRows;
  k.columns = V::kColumns;
  return k;
}

template <class Policy>
void positive_rows(const float* params, const float* cosine, int64_t n, float* logit,
                   float* slope) {
  const Policy policy(params);
  for (int64_t i = 0; i < n; ++i) {
    const Logit z = policy.positive(cosine[i]);
    logit[i] = z.value;
    slope[i] = z.dcosine;
  }
}

template <class Policy>
constexpr LossKernels sum_kernels() {
  LossKernels k = numbers_of<Policy>();
  k.sum_tile = with_policy<Policy, SumTile, sum_tile>;
  return k;
}

// Over classes.
template <class Policy>
constexpr LossKernels logsumexp_kernels() {
  LossKernels k = numbers_of<Policy>();
  k.logsumexp_tile = with_policy<Policy, LogsumexpTile, logsumexp_tile>;
  k.logsumexp_gradient_tile = with_policy<Policy, LogsumexpGradientTile, logsumexp_gradient_tile>;
  if constexpr (kHasPositive<Policy>) k.positive_rows = positive_rows<Policy>;
  return k;
}

// Over samples.
template <class Policy>
constexpr LossKernels pair_logsumexp_kernels() {
  LossKernels k = numbers_of<Policy>();
  k.pair_negatives_tile = with_policy<Policy, PairNegatives, pair_negatives_tile<false>>;
  k.pair_positives_tile = with_policy<Policy, PairPositives, pair_positives_tile>;
  k.pair_gradient_tile = with_policy<Policy, PairGradient, pair_gradient_tile<false>>;
  return k;
}

// Over samples, one of positives and one of negatives.
template <class Policy>
constexpr LossKernels pair_logsumexps_kernels() {
  LossKernels k = numbers_of<Policy>();
  k.pair_negatives_tile = with_policy<Policy, PairNegatives, pair_negatives_tile<true>>;
  k.pair_gradient_tile = with_policy<Policy, PairGradient, pair_gradient_tile<true>>;
  return k;
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
