// Epilogue of a `sum` loss: cosines of a tile -> losses, threshold and cosine gradients.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cpu/elements.h"
#include "cpu/loss_kernels.h"
#include "cpu/loss_sums.h"
#include "cpu/units.h"
#include "cpu/variables.h"
#include "unitsface/policy.h"
#include "unitsface/scalar_math.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// Sums of one row, in float: a tile is a few thousand columns, added up in 4 to 16 lanes.
struct RowSums {
  float loss = 0.0f;
  float dthreshold = 0.0f;
};

inline float row_weight(const SumTile& t, int64_t i) {
  return t.a_weights == nullptr ? 1.0f : t.a_weights[i];
}

// Excluded column of row i, -1 if none; `diagonal` is the tile's excluded diagonal.
inline int32_t excluded_column(int64_t i, int64_t diagonal, int64_t m) {
  const int64_t column = diagonal == INT64_MIN ? -1 : i + diagonal;
  return column >= 0 && column < m ? static_cast<int32_t>(column) : -1;
}

// What columns give to the pairs of a tile [m], and their sums over a unit of rows.
template <class Policy>
struct Columns {
  const float* __restrict thresholds;
  const float* __restrict weights;
  LossSums<Policy> loss;
  float* __restrict dthreshold;  // [m]
  float* __restrict slopes;      // [kRows + kColumns of the policy, m]
};

// Row i of a tile whose threshold and variables, if any, are scalars: both directions of a pair are
// one evaluation. Derivatives by the variables are written to `own` [kScalars].
template <bool kGradient, bool kColumns, class Policy>
RowSums scalar_row(const Policy policy, const SumTile& t, int64_t i, float* __restrict gradient,
                   const Columns<Policy> columns, float* __restrict own) {
  constexpr int kScalars = VariablesOf<Policy>::kScalars;
  const float* __restrict weights = columns.weights;
  const float* __restrict cosine = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  const float threshold = t.b_threshold[0], weight = row_weight(t, i);
  const float mirror = t.mirrored ? 1.0f : 0.0f;  // the gradient counts both directions of a pair
  const float both = kColumns ? 1.0f : 0.0f;      // the statistics count both directions
  const Variables<Policy> scalars = forward_variables<Policy>(t);
  float dthresholds[kLanes] = {}, slopes[(kScalars + 1) * kLanes] = {};
  const auto add_pair = [&](int32_t j, int32_t lane, const LossSums<Policy>& sums) UF_INLINED {
    const int32_t other = labels[j];
    const auto pair = pair_term(policy, cosine[j], threshold, other == label, scalars.at(i, j));
    const bool valid = (other >= 0) & (j != skipped);
    sums.add(lane, pair, valid);
    if constexpr (kColumns) columns.loss.add(j, pair, valid);
    const float other_weight = weights[j];
    const float statistics_weight = weight + both * other_weight;
    dthresholds[lane] += valid ? statistics_weight * pair.dthreshold : 0.0f;
    each<kScalars>([&](auto v) {
      slopes[v * kLanes + lane] += valid ? statistics_weight * pair.slope[v] : 0.0f;
    });
    if constexpr (kGradient) {
      gradient[j] = valid ? (weight + mirror * other_weight) * pair.dcosine : 0.0f;
    }
  };
  const float loss = sum_of_row(policy, static_cast<int32_t>(t.m), add_pair);
  each<kScalars>([&](auto v) { own[v] = sum_of(slopes + v * kLanes, kLanes); });
  return {loss, sum_of(dthresholds, kLanes)};
}

// Row i of a tile whose two directions of a pair differ: with a threshold per column, or variables
// of rows or columns. Without kBack only the row's direction is computed. Derivatives by what the
// row gives to its pairs are written to `own` [kCount].
template <bool kGradient, bool kColumns, bool kBack, class Policy>
RowSums directed_row(const Policy policy, const SumTile& t, int64_t i, float* __restrict gradient,
                     const Columns<Policy> columns, float* __restrict own) {
  using V = VariablesOf<Policy>;
  constexpr int kOfRows = V::kScalars + V::kRows;
  const float* __restrict cosine = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const float* __restrict thresholds = columns.thresholds;
  const float* __restrict weights = columns.weights;
  float* __restrict column_dthreshold = columns.dthreshold;
  float* __restrict column_slopes = columns.slopes;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  const float a_threshold = t.per_column && kBack ? t.a_threshold[i] : t.b_threshold[0];
  const float weight = row_weight(t, i);
  const Variables<Policy> forwards = forward_variables<Policy>(t);
  const Variables<Policy> backwards = backward_variables<Policy>(t);
  float dthresholds[kLanes] = {}, slopes[(V::kCount + 1) * kLanes] = {};
  const auto add_pair = [&](int32_t j, int32_t lane, const LossSums<Policy>& sums) UF_INLINED {
    const int32_t other = labels[j];
    const bool valid = (other >= 0) & (j != skipped), positive = other == label;
    const auto forth = pair_term(policy, cosine[j], thresholds[j], positive, forwards.at(i, j));
    float slope = weight * forth.dcosine;
    sums.add(lane, forth, valid);
    column_dthreshold[j] += valid ? weight * forth.dthreshold : 0.0f;
    each<kOfRows>(
        [&](auto v) { slopes[v * kLanes + lane] += valid ? weight * forth.slope[v] : 0.0f; });
    each<V::kColumns>([&](auto c) {
      column_slopes[(V::kRows + c) * t.m + j] += valid ? weight * forth.slope[kOfRows + c] : 0.0f;
    });
    if constexpr (kBack) {
      const auto back = pair_term(policy, cosine[j], a_threshold, positive, backwards.at(j, i));
      const float other_weight = weights[j];
      slope += other_weight * back.dcosine;
      if constexpr (kColumns) {
        columns.loss.add(j, back, valid);
        dthresholds[lane] += valid ? other_weight * back.dthreshold : 0.0f;
        each<V::kScalars>([&](auto v) {
          slopes[v * kLanes + lane] += valid ? other_weight * back.slope[v] : 0.0f;
        });
        each<V::kRows>([&](auto r) {
          column_slopes[r * t.m + j] += valid ? other_weight * back.slope[V::kScalars + r] : 0.0f;
        });
        each<V::kColumns>([&](auto c) {
          constexpr int v = kOfRows + c;
          slopes[v * kLanes + lane] += valid ? other_weight * back.slope[v] : 0.0f;
        });
      }
    }
    if constexpr (kGradient) gradient[j] = valid ? slope : 0.0f;
  };
  const float loss = sum_of_row(policy, static_cast<int32_t>(t.m), add_pair);
  each<V::kCount>([&](auto v) { own[v] = sum_of(slopes + v * kLanes, kLanes); });
  return {loss, sum_of(dthresholds, kLanes)};
}

// kDirections: 0 if both directions of a pair are one, else those that are computed.
template <bool kGradient, bool kColumns, int kDirections, class Policy>
void sum_tile(const Policy policy, const SumTile& t, int threads) {
  using V = VariablesOf<Policy>;
  if (t.m == 0) return;
  const int64_t units = units_of(t.n);
  const bool has_weights = t.b_weights != nullptr;
  const bool fills_thresholds = kDirections > 0 && !t.per_column;
  Workspace ones(has_weights ? 0 : t.m), thresholds(fills_thresholds ? t.m : 0);
  for (int64_t j = 0; !has_weights && j < t.m; ++j) ones.data()[j] = 1.0f;
  for (int64_t j = 0; fills_thresholds && j < t.m; ++j) thresholds.data()[j] = t.b_threshold[0];
  // Per unit: losses with their products, derivatives by thresholds, and by variables.
  constexpr int kLosses = kColumns ? 1 + kProducts<Policy> : 0;
  constexpr int kSums = kLosses + (kDirections > 0 ? 1 + V::kRows + V::kColumns : 0);
  Workspace sums(kSums * units * t.m), row_dthreshold(t.n), own(V::kCount * t.n);
  const auto at = [&](int64_t unit, int64_t which) {
    return sums.data() + (kSums * unit + which) * t.m;
  };

  // A row's gradient before it is rounded.
  const bool rounded = kGradient && t.gradient_dtype == DType::kBFloat16;
  Workspace rows(rounded ? threads * t.m : 0);

  parallel_units(t.n, t.m, threads, [&](int64_t unit, int64_t first, int64_t end, int slot) {
    const Columns<Policy> columns{fills_thresholds ? thresholds.data() : t.b_threshold,
                                  has_weights ? t.b_weights : ones.data(),
                                  {at(unit, 0), at(unit, 1), t.m},
                                  at(unit, kLosses),
                                  at(unit, kLosses + 1)};
    for (int64_t i = first; i < end; ++i) {
      float* gradient = nullptr;
      if (kGradient) {
        gradient =
            rounded ? rows.data() + slot * t.m : static_cast<float*>(t.gradient) + i * t.stride;
      }
      const auto finish = [&] {
        if (rounded) round_row(gradient, static_cast<BFloat16*>(t.gradient) + i * t.stride, t.m);
      };
      if (t.a_labels[i] < 0) {
        for (int64_t j = 0; kGradient && j < t.m; ++j) gradient[j] = 0.0f;
        finish();
        continue;
      }
      float* own_of_row = own.data() + i * V::kCount;
      RowSums found;
      if constexpr (kDirections == 0) {
        found = scalar_row<kGradient, kColumns>(policy, t, i, gradient, columns, own_of_row);
      } else {
        found = directed_row<kGradient, kColumns, kDirections == 2>(policy, t, i, gradient, columns,
                                                                    own_of_row);
      }
      t.a_loss[i] += found.loss;
      row_dthreshold.data()[i] = found.dthreshold;
      finish();
    }
    if constexpr (kLosses > 1) columns.loss.add_logarithms(policy, t.m);
  });

  const auto add = [&](double* total, int64_t which) {
    for (int64_t unit = 0; total != nullptr && unit < units; ++unit) {
      const float* of_unit = at(unit, which);
      for (int64_t j = 0; j < t.m; ++j) total[j] += of_unit[j];
    }
  };
  if (kColumns) add(t.b_loss, 0);
  if (t.per_column) add(t.b_dthreshold, kLosses);
  for (int64_t unit = 0; fills_thresholds && t.b_dthreshold != nullptr && unit < units; ++unit) {
    for (int64_t j = 0; j < t.m; ++j) t.b_dthreshold[0] += at(unit, kLosses)[j];
  }
  // Rows give a threshold of their own to the pairs of columns, or all pairs have the same one.
  double* of_rows = t.per_column ? t.a_dthreshold : t.b_dthreshold;
  const bool adds_rows = t.b_dthreshold != nullptr && (kColumns || !t.per_column);
  for (int64_t i = 0; adds_rows && i < t.n; ++i) of_rows[t.per_column ? i : 0] += row_dthreshold[i];
  add_to_gradients<Policy, kColumns>(
      t, own.data(), [&](double* total, int64_t which) { add(total, kLosses + 1 + which); });
}

template <bool kGradient, class Policy>
void sum_tile(const Policy policy, const SumTile& t, int threads) {
  const bool columns = t.b_loss != nullptr;
  if constexpr (!kDirected<Policy>) {
    if (!t.per_column) {
      return (columns ? sum_tile<kGradient, true, 0, Policy>
                      : sum_tile<kGradient, false, 0, Policy>)(policy, t, threads);
    }
  }
  if constexpr (kDirected<Policy> || Policy::kRowThresholds) {
    if (columns) return sum_tile<kGradient, true, 2>(policy, t, threads);
    if constexpr (kGradient) {
      if (t.mirrored) return sum_tile<true, false, 2>(policy, t, threads);
    }
  } else if (columns || t.mirrored) {
    throw std::invalid_argument("rows of this loss have no threshold of their own");
  }
  sum_tile<kGradient, false, 1>(policy, t, threads);
}

template <class Policy>
void sum_tile(const Policy policy, const SumTile& t, int threads) {
  if (t.gradient == nullptr) {
    sum_tile<false>(policy, t, threads);
  } else {
    sum_tile<true>(policy, t, threads);
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
