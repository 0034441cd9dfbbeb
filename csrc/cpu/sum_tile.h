// Epilogue of a `sum` loss: cosines of a tile -> losses, threshold and cosine gradients.
#pragma once

#include <cstdint>

#include "cpu/elements.h"
#include "cpu/loss_kernels.h"
#include "cpu/loss_sums.h"
#include "cpu/pool.h"
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

// Row i of a tile whose threshold is a scalar; `weights` are those of the columns.
template <bool kGradient, bool kColumns, class Policy, class Gradient>
RowSums scalar_row(const Policy policy, const SumTile& t, int64_t i, Gradient* __restrict gradient,
                   const float* __restrict weights, const LossSums<Policy> columns) {
  const float* __restrict cosine = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  const float threshold = t.b_threshold[0], weight = row_weight(t, i);
  const float mirror = t.mirrored ? 1.0f : 0.0f;  // the gradient counts both directions of a pair
  const float both = kColumns ? 1.0f : 0.0f;      // the statistics count both directions
  float dthresholds[kLanes] = {};
  const auto add_pair = [&](int32_t j, int32_t lane, const LossSums<Policy>& sums) UF_INLINED {
    const int32_t other = labels[j];
    const auto pair = pair_term(policy, cosine[j], threshold, other == label);
    const bool valid = (other >= 0) & (j != skipped);
    sums.add(lane, pair, valid);
    if constexpr (kColumns) columns.add(j, pair, valid);
    const float other_weight = weights[j];
    dthresholds[lane] += valid ? (weight + both * other_weight) * pair.dthreshold : 0.0f;
    if constexpr (kGradient) {
      const float slope = valid ? (weight + mirror * other_weight) * pair.dcosine : 0.0f;
      gradient[j] = round_to<Gradient>(slope);
    }
  };
  const float loss = sum_of_row(policy, static_cast<int32_t>(t.m), add_pair);
  return {loss, sum_of(dthresholds, kLanes)};
}

// The same of a policy whose variables are scalars: both directions of a pair are one evaluation.
// Derivatives by the scalars are written to `own` [kScalars].
template <bool kGradient, bool kColumns, class Policy, class Gradient>
RowSums scalars_row(const Policy policy, const SumTile& t, int64_t i, Gradient* __restrict gradient,
                    const float* __restrict weights, float* __restrict column_loss,
                    float* __restrict own) {
  using V = VariablesOf<Policy>;
  const float* __restrict cosine = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  const float threshold = t.b_threshold[0], weight = row_weight(t, i);
  const float mirror = t.mirrored ? 1.0f : 0.0f, both = kColumns ? 1.0f : 0.0f;
  const Variables<Policy> scalars = forward_variables<Policy>(t);
  float slopes[V::kCount * kSlopeBlock];
  float loss = 0.0f, dthreshold = 0.0f;
  for (int64_t start = 0; start < t.m; start += kSlopeBlock) {
    const int64_t stop = t.m < start + kSlopeBlock ? t.m : start + kSlopeBlock;
    const int32_t count = static_cast<int32_t>(stop - start);
#pragma omp simd reduction(+ : loss, dthreshold)
    for (int32_t k = 0; k < count; ++k) {
      const int64_t j = start + k;
      const int32_t other = labels[j];
      const bool valid = (other >= 0) & (j != skipped);
      const auto term = policy.evaluate(cosine[j], threshold, other == label, scalars.at(i, j));
      const float value = valid ? term.value : 0.0f;
      loss += value;
      if (kColumns) column_loss[j] += value;
      const float other_weight = weights[j];
      const float statistics_weight = valid ? weight + both * other_weight : 0.0f;
      dthreshold += valid ? statistics_weight * term.dthreshold : 0.0f;
      each<V::kScalars>([&](auto v) {
        slopes[v * kSlopeBlock + k] = valid ? statistics_weight * term.slope[v] : 0.0f;
      });
      if (kGradient) {
        const float slope = valid ? (weight + mirror * other_weight) * term.dcosine : 0.0f;
        gradient[j] = round_to<Gradient>(slope);
      }
    }
    each<V::kScalars>([&](auto v) { own[v] += sum_of(slopes + v * kSlopeBlock, count); });
  }
  return {loss, dthreshold};
}

// Row i of a tile with a threshold per column identity: the two directions of a pair differ.
template <bool kGradient, bool kColumns, class Policy, class Gradient>
RowSums per_column_row(const Policy policy, const SumTile& t, int64_t i,
                       Gradient* __restrict gradient, const float* __restrict weights,
                       const LossSums<Policy> columns, float* __restrict column_dthreshold) {
  const float* __restrict cosine = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const float* __restrict b_threshold = t.b_threshold;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  // A memory or a shard has no thresholds for the rows, and no other direction is computed.
  const float a_threshold = t.a_threshold != nullptr ? t.a_threshold[i] : 0.0f;
  const float weight = row_weight(t, i), mirror = t.mirrored ? 1.0f : 0.0f;
  float dthresholds[kLanes] = {};
  const auto add_pair = [&](int32_t j, int32_t lane, const LossSums<Policy>& sums) UF_INLINED {
    const int32_t other = labels[j];
    const bool valid = (other >= 0) & (j != skipped);
    const auto forth = pair_term(policy, cosine[j], b_threshold[j], other == label);
    const auto back = pair_term(policy, cosine[j], a_threshold, other == label);
    const float other_weight = mirror * weights[j];
    sums.add(lane, forth, valid);
    column_dthreshold[j] += valid ? weight * forth.dthreshold : 0.0f;
    if constexpr (kColumns) {
      columns.add(j, back, valid);
      dthresholds[lane] += valid ? other_weight * back.dthreshold : 0.0f;
    }
    if constexpr (kGradient) {
      const float slope = valid ? weight * forth.dcosine + other_weight * back.dcosine : 0.0f;
      gradient[j] = round_to<Gradient>(slope);
    }
  };
  const float loss = sum_of_row(policy, static_cast<int32_t>(t.m), add_pair);
  return {loss, sum_of(dthresholds, kLanes)};
}

// Values of one unit of rows that add up column by column.
struct ColumnSums {
  float* __restrict loss;        // [m]
  float* __restrict dthreshold;  // [m]
  float* __restrict slopes;      // [kRows + kColumns of the policy, m]
};

// Row i of a tile of a policy with variables; `thresholds` are those of the columns. Derivatives by
// what row i gives to its pairs are added to `own` [kCount].
template <bool kGradient, bool kColumns, bool kBack, class Policy, class Gradient>
RowSums variable_row(const Policy policy, const SumTile& t, int64_t i,
                     Gradient* __restrict gradient, const float* __restrict thresholds,
                     const float* __restrict weights, const ColumnSums sums,
                     float* __restrict own) {
  using V = VariablesOf<Policy>;
  const float* __restrict cosine = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  const float a_threshold = t.per_column && kBack ? t.a_threshold[i] : t.b_threshold[0];
  const float weight = row_weight(t, i);
  const Variables<Policy> forwards = forward_variables<Policy>(t);
  const Variables<Policy> backwards = backward_variables<Policy>(t);
  float slopes[V::kCount * kSlopeBlock];
  float loss = 0.0f, dthreshold = 0.0f;
  for (int64_t start = 0; start < t.m; start += kSlopeBlock) {
    const int64_t stop = t.m < start + kSlopeBlock ? t.m : start + kSlopeBlock;
    const int32_t count = static_cast<int32_t>(stop - start);
#pragma omp simd reduction(+ : loss, dthreshold)
    for (int32_t k = 0; k < count; ++k) {
      const int64_t j = start + k;
      const int32_t other = labels[j];
      const bool valid = (other >= 0) & (j != skipped), positive = other == label;
      const auto forth = policy.evaluate(cosine[j], thresholds[j], positive, forwards.at(i, j));
      float slope = weight * forth.dcosine;
      loss += valid ? forth.value : 0.0f;
      sums.dthreshold[j] += valid ? weight * forth.dthreshold : 0.0f;
      each<V::kScalars + V::kRows>(
          [&](auto v) { slopes[v * kSlopeBlock + k] = valid ? weight * forth.slope[v] : 0.0f; });
      each<V::kColumns>([&](auto c) {
        constexpr int v = V::kScalars + V::kRows + c;
        sums.slopes[(V::kRows + c) * t.m + j] += valid ? weight * forth.slope[v] : 0.0f;
      });
      if constexpr (kBack) {
        const auto back = policy.evaluate(cosine[j], a_threshold, positive, backwards.at(j, i));
        const float other_weight = weights[j];
        slope += other_weight * back.dcosine;
        if constexpr (kColumns) {
          sums.loss[j] += valid ? back.value : 0.0f;
          dthreshold += valid ? other_weight * back.dthreshold : 0.0f;
          each<V::kScalars>([&](auto v) {
            slopes[v * kSlopeBlock + k] += valid ? other_weight * back.slope[v] : 0.0f;
          });
          each<V::kRows>([&](auto r) {
            constexpr int v = V::kScalars + r;
            sums.slopes[r * t.m + j] += valid ? other_weight * back.slope[v] : 0.0f;
          });
          each<V::kColumns>([&](auto c) {
            constexpr int v = V::kScalars + V::kRows + c;
            slopes[v * kSlopeBlock + k] = valid ? other_weight * back.slope[v] : 0.0f;
          });
        }
      }
      if constexpr (kGradient) gradient[j] = round_to<Gradient>(valid ? slope : 0.0f);
    }
    each<V::kScalars + V::kRows + (kColumns ? V::kColumns : 0)>(
        [&](auto v) { own[v] += sum_of(slopes + v * kSlopeBlock, count); });
  }
  return {loss, dthreshold};
}

// A tile of a policy with variables: the two directions of a pair differ, as with a threshold per
// column, for which one threshold is written once for each.
template <bool kGradient, bool kColumns, bool kBack, class Gradient, class Policy>
void variable_tile(const Policy policy, const SumTile& t, int threads) {
  using V = VariablesOf<Policy>;
  if (t.m == 0) return;
  constexpr int kMatrices = V::kRows + V::kColumns;
  const int64_t units = (t.n + kRowsPerUnit - 1) / kRowsPerUnit;
  Workspace thresholds(t.m), weights(t.m), own(V::kCount * t.n), row_dthreshold(t.n);
  for (int64_t j = 0; j < t.m; ++j) {
    thresholds.data()[j] = t.b_threshold[t.per_column ? j : 0];
    weights.data()[j] = t.b_weights == nullptr ? 1.0f : t.b_weights[j];
  }
  // Loss, derivative by the threshold, and by each variable.
  Workspace columns((2 + kMatrices) * units * t.m);
  const auto at = [&](int64_t unit, int64_t which) {
    return columns.data() + ((2 + kMatrices) * unit + which) * t.m;
  };

  parallel_chunks(units, threads, [&](int64_t unit, int) {
    const int64_t end = t.n < (unit + 1) * kRowsPerUnit ? t.n : (unit + 1) * kRowsPerUnit;
    for (int64_t i = unit * kRowsPerUnit; i < end; ++i) {
      Gradient* gradient = kGradient ? static_cast<Gradient*>(t.gradient) + i * t.stride : nullptr;
      if (t.a_labels[i] < 0) {
        for (int64_t j = 0; kGradient && j < t.m; ++j) gradient[j] = round_to<Gradient>(0.0f);
        continue;
      }
      const RowSums sums = variable_row<kGradient, kColumns, kBack>(
          policy, t, i, gradient, thresholds.data(), weights.data(),
          ColumnSums{at(unit, 0), at(unit, 1), at(unit, 2)}, own.data() + i * V::kCount);
      t.a_loss[i] += sums.loss;
      row_dthreshold.data()[i] = sums.dthreshold;
    }
  });

  const auto add = [&](double* sums, int64_t which) {
    for (int64_t unit = 0; sums != nullptr && unit < units; ++unit) {
      for (int64_t j = 0; j < t.m; ++j) sums[j] += at(unit, which)[j];
    }
  };
  if (kColumns) add(t.b_loss, 0);
  if (t.per_column) {
    add(t.b_dthreshold, 1);
  } else if (t.b_dthreshold != nullptr) {
    for (int64_t unit = 0; unit < units; ++unit) {
      for (int64_t j = 0; j < t.m; ++j) t.b_dthreshold[0] += at(unit, 1)[j];
    }
  }
  for (int64_t i = 0; kColumns && t.b_dthreshold != nullptr && i < t.n; ++i) {
    *(t.per_column ? t.a_dthreshold + i : t.b_dthreshold) += row_dthreshold[i];
  }
  add_to_gradients<Policy, kColumns>(t, own.data(),
                                     [&](double* sums, int64_t which) { add(sums, 2 + which); });
}

template <bool kGradient, bool kColumns, class Gradient, class Policy>
void sum_tile(const Policy policy, const SumTile& t, int threads) {
  constexpr int kScalars = VariablesOf<Policy>::kCount;
  if (t.m == 0) return;
  const int64_t units = (t.n + kRowsPerUnit - 1) / kRowsPerUnit;
  const bool column_thresholds = t.per_column && t.b_dthreshold != nullptr;
  Workspace ones(t.b_weights == nullptr ? t.m : 0);
  for (int64_t j = 0; t.b_weights == nullptr && j < t.m; ++j) ones.data()[j] = 1.0f;
  const float* weights = t.b_weights == nullptr ? ones.data() : t.b_weights;
  // The products of a unit are beside its sums.
  const int64_t unit_sums = kColumns ? t.m * (1 + kProducts<Policy>) : 0;
  Workspace column_loss(units * unit_sums);
  Workspace column_dthreshold(t.per_column ? units * t.m : 0);
  Workspace row_dthreshold(t.n), own(kScalars * t.n);

  parallel_chunks(units, threads, [&](int64_t unit, int) {
    const int64_t end = t.n < (unit + 1) * kRowsPerUnit ? t.n : (unit + 1) * kRowsPerUnit;
    float* sums_of_unit = column_loss.data() + unit * unit_sums;
    const LossSums<Policy> columns{sums_of_unit, kColumns ? sums_of_unit + t.m : nullptr, t.m};
    float* thresholds = t.per_column ? column_dthreshold.data() + unit * t.m : nullptr;
    for (int64_t i = unit * kRowsPerUnit; i < end; ++i) {
      Gradient* gradient = kGradient ? static_cast<Gradient*>(t.gradient) + i * t.stride : nullptr;
      if (t.a_labels[i] < 0) {
        if (kGradient) {
          for (int64_t j = 0; j < t.m; ++j) gradient[j] = round_to<Gradient>(0.0f);
        }
        continue;
      }
      RowSums sums;
      if constexpr (kScalars > 0) {
        sums = scalars_row<kGradient, kColumns>(policy, t, i, gradient, weights, columns.values,
                                                own.data() + i * kScalars);
      } else if (t.per_column) {
        sums = per_column_row<kGradient, kColumns>(policy, t, i, gradient, weights, columns,
                                                   thresholds);
      } else {
        sums = scalar_row<kGradient, kColumns>(policy, t, i, gradient, weights, columns);
      }
      t.a_loss[i] += sums.loss;
      row_dthreshold.data()[i] = sums.dthreshold;
    }
    if constexpr (kColumns && kProducts<Policy> > 0) columns.add_logarithms(policy, t.m);
  });

  for (int64_t unit = 0; kColumns && unit < units; ++unit) {
    for (int64_t j = 0; j < t.m; ++j) t.b_loss[j] += column_loss[unit * unit_sums + j];
  }
  for (int64_t unit = 0; column_thresholds && unit < units; ++unit) {
    for (int64_t j = 0; j < t.m; ++j) t.b_dthreshold[j] += column_dthreshold[unit * t.m + j];
  }
  for (int64_t i = 0; t.d_scalars != nullptr && i < t.n; ++i) {
    for (int v = 0; v < kScalars; ++v) t.d_scalars[v] += own[i * kScalars + v];
  }
  if (t.b_dthreshold == nullptr) return;
  for (int64_t i = 0; i < t.n; ++i) {
    if (!t.per_column) {
      t.b_dthreshold[0] += row_dthreshold[i];
    } else if (kColumns) {
      t.a_dthreshold[i] += row_dthreshold[i];
    }
  }
}

// Of policies with variables: a threshold per column, and what belongs to rows and columns.
template <bool kGradient, class Gradient, class Policy>
void any_variable_tile(const Policy policy, const SumTile& t, int threads) {
  if (t.b_loss != nullptr) {
    variable_tile<kGradient, true, true, Gradient>(policy, t, threads);
  } else if (kGradient && t.mirrored) {
    variable_tile<kGradient, false, kGradient, Gradient>(policy, t, threads);
  } else {
    variable_tile<kGradient, false, false, Gradient>(policy, t, threads);
  }
}

template <bool kGradient, class Gradient, class Policy>
void sum_tile(const Policy policy, const SumTile& t, int threads) {
  if constexpr (VariablesOf<Policy>::kCount > 0) {
    if (kDirected<Policy> || t.per_column) {
      return any_variable_tile<kGradient, Gradient>(policy, t, threads);
    }
  }
  if constexpr (!kDirected<Policy>) {
    if (t.b_loss != nullptr) {
      sum_tile<kGradient, true, Gradient>(policy, t, threads);
    } else {
      sum_tile<kGradient, false, Gradient>(policy, t, threads);
    }
  }
}

template <class Policy>
void sum_tile(const Policy policy, const SumTile& t, int threads) {
  if (t.gradient == nullptr) {
    sum_tile<false, float>(policy, t, threads);
  } else if (t.gradient_dtype == DType::kBFloat16) {
    sum_tile<true, BFloat16>(policy, t, threads);
  } else {
    sum_tile<true, float>(policy, t, threads);
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
