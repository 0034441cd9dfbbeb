// Epilogues of a `logsumexp` loss over classes.
#pragma once

#include <cstdint>

#include "cpu/elements.h"
#include "cpu/loss_kernels.h"
#include "cpu/pool.h"
#include "cpu/units.h"
#include "cpu/variables.h"
#include "unitsface/policy.h"
#include "unitsface/scalar_math.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// The logit of a negative at column j of row i.
template <class Policy, class Tile>
UF_HOST_DEVICE auto negative_at(const Policy& policy, const Tile& t, int64_t i, int64_t j,
                                float cosine) {
  if constexpr (VariablesOf<Policy>::kCount > 0) {
    const Variables<Policy> v = forward_variables<Policy>(t);
    return policy.negative(cosine, v.at(i, j));
  } else {
    return policy.negative(cosine);
  }
}

// Folds a tile's negatives into each row's maximum and total = sum exp(z - maximum).
template <class Policy>
void logsumexp_tile(const Policy policy, const LogsumexpTile& t, int threads) {
  parallel_rows(t.n, t.m, threads, [&](int64_t i) {
    float* __restrict row = t.cosines + i * t.stride;
    const int64_t target = t.targets[i] - t.start;
    const bool inside = t.targets[i] >= 0 && target >= 0 && target < t.m;
    const float target_cosine = inside ? row[target] : 0.0f;
    if (inside) {
      t.target_cosine[i] = target_cosine;
      if (t.m == 1) return;
      // A neighbor replaces the target, which must not raise the maximum.
      row[target] = row[target == 0 ? 1 : 0];
    }
    float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < t.m; ++j) {
      float z = negative_at(policy, t, i, j, row[j]).value;
      // A neighbor's cosine is not enough where the logit depends on the column.
      if (VariablesOf<Policy>::kColumns > 0) z = inside && j == target ? -INFINITY : z;
      highest = z > highest ? z : highest;
    }
    const float previous = t.maximum[i];
    const float maximum = highest > previous ? highest : previous;
    const float shift = maximum == -INFINITY ? 0.0f : maximum;
    // Logits are computed twice: the cosines may be needed again, and their row is in the cache.
    const auto term = [&](int64_t j) {
      return exp_clamped(negative_at(policy, t, i, j, row[j]).value - shift);
    };
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
  const float* __restrict cosine = t.cosines + i * t.stride;
  const float log_negatives = t.log_negatives[i], weight = t.negative_weight[i];
  const int64_t target = t.targets[i] >= 0 ? t.targets[i] - t.start : -1;
  float slopes[(V::kScalars + V::kRows) * kSlopeBlock + 1];
  for (int64_t start = 0; start < t.m; start += kSlopeBlock) {
    const int64_t stop = t.m < start + kSlopeBlock ? t.m : start + kSlopeBlock;
    const int32_t count = static_cast<int32_t>(stop - start);
    const int64_t left_out = target - start;
    const int32_t skipped = left_out >= 0 && left_out < count ? static_cast<int32_t>(left_out) : -1;
#pragma omp simd
    for (int32_t k = 0; k < count; ++k) {
      const auto z = negative_at(policy, t, i, start + k, cosine[start + k]);
      const float share = k == skipped ? 0.0f : weight * exp_clamped(z.value - log_negatives);
      each<V::kScalars + V::kRows>(
          [&](auto v) { slopes[v * kSlopeBlock + k] = share * z.slope[v]; });
      each<V::kColumns>([&](auto c) {
        columns[c * t.m + start + k] += share * z.slope[V::kScalars + V::kRows + c];
      });
    }
    for (int v = 0; v < V::kScalars + V::kRows; ++v) {
      double* sums = v < V::kScalars ? t.a_dscalars : t.a_drows;
      const int64_t row = v < V::kScalars ? v : v - V::kScalars;
      if (sums != nullptr) sums[row * t.row_stride + i] += sum_of(slopes + v * kSlopeBlock, count);
    }
  }
}

// Those of all rows, which a row's gradient may overwrite.
template <class Policy>
void add_slopes(const Policy policy, const LogsumexpGradientTile& t, int threads) {
  const int64_t units = (t.n + kRowsPerUnit - 1) / kRowsPerUnit;
  const int64_t width = VariablesOf<Policy>::kColumns * t.m;
  Workspace columns(units * width);
  parallel_chunks(units, threads, [&](int64_t unit, int) {
    const int64_t end = t.n < (unit + 1) * kRowsPerUnit ? t.n : (unit + 1) * kRowsPerUnit;
    for (int64_t i = unit * kRowsPerUnit; i < end; ++i) {
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
void logsumexp_gradient_tile(const Policy policy, const LogsumexpGradientTile& t, int threads) {
  if constexpr (VariablesOf<Policy>::kCount > 0) {
    const bool wanted = t.a_dscalars != nullptr || t.a_drows != nullptr || t.b_dcolumns != nullptr;
    if (wanted) add_slopes(policy, t, threads);
  }
  parallel_rows(t.n, t.m, threads, [&](int64_t i) {
    const float* cosine = t.cosines + i * t.stride;
    Gradient* gradient = static_cast<Gradient*>(t.gradient) + i * t.stride;
    const float weight = t.negative_weight[i];
    if (weight == 0.0f) {
      for (int64_t j = 0; j < t.m; ++j) gradient[j] = round_to<Gradient>(0.0f);
    } else {
      const float log_negatives = t.log_negatives[i];
#pragma omp simd
      for (int64_t j = 0; j < t.m; ++j) {
        const auto z = negative_at(policy, t, i, j, cosine[j]);
        gradient[j] = round_to<Gradient>(weight * exp_clamped(z.value - log_negatives) * z.dcosine);
      }
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
