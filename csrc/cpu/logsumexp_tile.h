// Epilogues of a `logsumexp` loss over classes.
#pragma once

#include <cstdint>

#include "cpu/elements.h"
#include "cpu/lanes.h"
#include "cpu/logit_at.h"
#include "cpu/loss_kernels.h"
#include "cpu/pool.h"
#include "cpu/units.h"
#include "cpu/variables.h"
#include "unitsface/policy.h"
#include "unitsface/scalar_math.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// Folds a tile's negatives into each row's maximum and total = sum exp(z - maximum).
template <class Policy>
void logsumexp_tile(const Policy policy, const LogsumexpTile& t, int threads) {
  parallel_rows(t.n, t.m, threads, [&](int64_t i) {
    float* __restrict row = t.cosines + i * t.stride;
    const Variables<Policy> v = forward_variables<Policy>(t);
    const int64_t target = t.targets[i] - t.start;
    const bool inside = t.targets[i] >= 0 && target >= 0 && target < t.m;
    const float target_cosine = inside ? row[target] : 0.0f;
    if (inside) {
      t.target_cosine[i] = target_cosine;
      if (t.m == 1) return;
      // A neighbor replaces the target, which must not raise the maximum.
      row[target] = row[target == 0 ? 1 : 0];
    }
    const auto logit = [&](int64_t j)
                           UF_INLINED { return negative_at(policy, row[j], v, i, j).value; };
    float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < t.m; ++j) {
      float z = logit(j);
      // A neighbor's cosine is not enough where the logit depends on the column.
      if (VariablesOf<Policy>::kColumns > 0) z = inside && j == target ? -INFINITY : z;
      highest = z > highest ? z : highest;
    }
    const float previous = t.maximum[i];
    const float maximum = highest > previous ? highest : previous;
    const float shift = maximum == -INFINITY ? 0.0f : maximum;
    // Logits are computed twice: the cosines may be needed again, and their row is in the cache.
    const auto term = [&](int64_t j) UF_INLINED { return exp_clamped(logit(j) - shift); };
    const int64_t split = inside ? target : t.m;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < split; ++j) sum += term(j);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = split + 1; j < t.m; ++j) sum += term(j);
    if (inside) row[target] = target_cosine;
    if (highest == -INFINITY && sum == sum) return;  // every logit is -inf
    const float kept = t.total[i] == 0.0f ? 0.0f : t.total[i] * exp_clamped(previous - maximum);
    t.maximum[i] = maximum;
    t.total[i] = kept + sum;
  });
}

// Adds the derivatives of row i's negatives by scalars and by variables of rows; those by variables
// of columns to `columns` [kColumns, m].
template <class Policy>
void add_slopes(const Policy policy, const LogsumexpGradientTile& t, int64_t i,
                float* __restrict columns) {
  using V = VariablesOf<Policy>;
  constexpr int kOfRows = V::kScalars + V::kRows;
  const float* __restrict cosine = t.cosines + i * t.stride;
  const Variables<Policy> variables = forward_variables<Policy>(t);
  const float log_negatives = t.log_negatives[i], weight = t.negative_weight[i];
  // Columns of a tile, and the target's among them, fit into 32 bits.
  const int32_t m = static_cast<int32_t>(t.m);
  const int64_t left_out = t.targets[i] >= 0 ? t.targets[i] - t.start : -1;
  const int32_t target = left_out >= 0 && left_out < t.m ? static_cast<int32_t>(left_out) : -1;
  float slopes[(V::kCount + 1) * kLanes] = {};
  each_lane(0, m, [&](int32_t j, int32_t lane) UF_INLINED {
    const auto z = negative_at(policy, cosine[j], variables, i, j);
    const float share = j == target ? 0.0f : weight * exp_clamped(z.value - log_negatives);
    each<kOfRows>([&](auto v) { slopes[v * kLanes + lane] += share * z.slope[v]; });
    each<V::kColumns>([&](auto c) { columns[c * t.m + j] += share * z.slope[kOfRows + c]; });
  });
  for (int v = 0; v < kOfRows; ++v) {
    double* sums = v < V::kScalars ? t.a_dscalars : t.a_drows;
    const int64_t row = v < V::kScalars ? v : v - V::kScalars;
    if (sums != nullptr) sums[row * t.row_stride + i] += sum_of(slopes + v * kLanes, kLanes);
  }
}

// Those of all rows, which a row's gradient may overwrite.
template <class Policy>
void add_slopes(const Policy policy, const LogsumexpGradientTile& t, int threads) {
  const int64_t units = units_of(t.n);
  const int64_t width = VariablesOf<Policy>::kColumns * t.m;
  Workspace columns(units * width);
  parallel_units(t.n, t.m, threads, [&](int64_t unit, int64_t first, int64_t end, int) {
    for (int64_t i = first; i < end; ++i) {
      if (t.negative_weight[i] != 0.0f) add_slopes(policy, t, i, columns.data() + unit * width);
    }
  });
  for (int64_t c = 0; t.b_dcolumns != nullptr && c < VariablesOf<Policy>::kColumns; ++c) {
    double* sums = t.b_dcolumns + c * t.column_stride;
    for (int64_t unit = 0; unit < units; ++unit) {
      for (int64_t j = 0; j < t.m; ++j) sums[j] += columns[unit * width + c * t.m + j];
    }
  }
}

template <class Gradient, class Policy>
void logsumexp_gradient_tile(const Policy shared, const LogsumexpGradientTile& t, int threads) {
  if constexpr (VariablesOf<Policy>::kCount > 0) {
    const bool wanted = t.a_dscalars != nullptr || t.a_drows != nullptr || t.b_dcolumns != nullptr;
    if (wanted) add_slopes(shared, t, threads);
  }
  parallel_rows(t.n, t.m, threads, [&](int64_t i) {
    const Policy policy = shared;  // in registers: a gradient might be written to its memory
    const float* cosine = t.cosines + i * t.stride;
    Gradient* gradient = static_cast<Gradient*>(t.gradient) + i * t.stride;
    const Variables<Policy> v = forward_variables<Policy>(t);
    const float weight = t.negative_weight[i];
    if (weight == 0.0f) {
      for (int64_t j = 0; j < t.m; ++j) gradient[j] = round_to<Gradient>(0.0f);
    } else {
      const float log_negatives = t.log_negatives[i];
      const auto slope = [&](int64_t j) UF_INLINED {
        const auto z = negative_at(policy, cosine[j], v, i, j);
        return weight * exp_clamped(z.value - log_negatives) * z.dcosine;
      };
#pragma omp simd
      for (int64_t j = 0; j < t.m; ++j) gradient[j] = round_to<Gradient>(slope(j));
    }
    const int64_t target = t.targets[i] - t.start;
    if (t.targets[i] >= 0 && target >= 0 && target < t.m) {
      gradient[target] = round_to<Gradient>(t.target_gradient[i]);
    }
  });
}

template <class Policy>
void logsumexp_gradient_tile(const Policy policy, const LogsumexpGradientTile& t, int threads) {
  if (t.gradient_dtype == DType::kBFloat16) {
    logsumexp_gradient_tile<BFloat16>(policy, t, threads);
  } else {
    logsumexp_gradient_tile<float>(policy, t, threads);
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
