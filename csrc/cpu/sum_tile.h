// Epilogue of a `sum` loss: cosines of a tile -> losses, threshold and cosine gradients.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/elements.h"
#include "cpu/loss_kernels.h"
#include "cpu/pool.h"
#include "unitsface/policy.h"
#include "unitsface/scalar_math.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// Rows per unit of work. Column sums are kept per unit and added in order, so that results do not
// depend on the number of threads.
constexpr int64_t kRowsPerUnit = 32;

// Zeroed floats. Not std::vector: its out-of-line members would be merged by the linker across
// instruction sets, and a baseline processor could run AVX-512 code.
class Workspace {
 public:
  explicit Workspace(int64_t count)
      : data_(static_cast<float*>(std::calloc(count > 0 ? count : 1, sizeof(float)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* data() { return data_; }
  float operator[](int64_t i) const { return data_[i]; }

 private:
  float* data_;
};

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
                   const float* __restrict weights, float* __restrict column_loss) {
  const float* __restrict cosine = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  const int32_t count = static_cast<int32_t>(t.m);
  const float threshold = t.b_threshold[0], weight = row_weight(t, i);
  const float mirror = t.mirrored ? 1.0f : 0.0f;  // the gradient counts both directions of a pair
  const float both = kColumns ? 1.0f : 0.0f;      // the statistics count both directions
  float loss = 0.0f, dthreshold = 0.0f;
#pragma omp simd reduction(+ : loss, dthreshold)
  for (int32_t j = 0; j < count; ++j) {
    const int32_t other = labels[j];
    const Term term = policy.evaluate(cosine[j], threshold, other == label);
    const bool valid = (other >= 0) & (j != skipped);
    const float value = valid ? term.value : 0.0f;
    loss += value;
    if (kColumns) column_loss[j] += value;
    const float other_weight = weights[j];
    dthreshold += valid ? (weight + both * other_weight) * term.dthreshold : 0.0f;
    if (kGradient) {
      const float slope = valid ? (weight + mirror * other_weight) * term.dcosine : 0.0f;
      gradient[j] = round_to<Gradient>(slope);
    }
  }
  return {loss, dthreshold};
}

// Row i of a tile with a threshold per column identity: the two directions of a pair differ.
template <bool kGradient, bool kColumns, class Policy, class Gradient>
RowSums per_column_row(const Policy policy, const SumTile& t, int64_t i,
                       Gradient* __restrict gradient, const float* __restrict weights,
                       float* __restrict column_loss, float* __restrict column_dthreshold) {
  const float* __restrict cosine = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const float* __restrict b_threshold = t.b_threshold;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  const int32_t count = static_cast<int32_t>(t.m);
  // A memory or a shard has no thresholds for the rows, and no other direction is computed.
  const float a_threshold = t.a_threshold != nullptr ? t.a_threshold[i] : 0.0f;
  const float weight = row_weight(t, i), mirror = t.mirrored ? 1.0f : 0.0f;
  float loss = 0.0f, dthreshold = 0.0f;
#pragma omp simd reduction(+ : loss, dthreshold)
  for (int32_t j = 0; j < count; ++j) {
    const int32_t other = labels[j];
    const bool valid = (other >= 0) & (j != skipped);
    const Term forth = policy.evaluate(cosine[j], b_threshold[j], other == label);
    const Term back = policy.evaluate(cosine[j], a_threshold, other == label);
    const float other_weight = mirror * weights[j];
    loss += valid ? forth.value : 0.0f;
    column_dthreshold[j] += valid ? weight * forth.dthreshold : 0.0f;
    if (kColumns) {
      column_loss[j] += valid ? back.value : 0.0f;
      dthreshold += valid ? other_weight * back.dthreshold : 0.0f;
    }
    if (kGradient) {
      const float slope = valid ? weight * forth.dcosine + other_weight * back.dcosine : 0.0f;
      gradient[j] = round_to<Gradient>(slope);
    }
  }
  return {loss, dthreshold};
}

template <bool kGradient, bool kColumns, class Gradient, class Policy>
void sum_tile(const Policy policy, const SumTile& t, int threads) {
  if (t.m == 0) return;
  const int64_t units = (t.n + kRowsPerUnit - 1) / kRowsPerUnit;
  const bool column_thresholds = t.per_column && t.b_dthreshold != nullptr;
  Workspace ones(t.b_weights == nullptr ? t.m : 0);
  for (int64_t j = 0; t.b_weights == nullptr && j < t.m; ++j) ones.data()[j] = 1.0f;
  const float* weights = t.b_weights == nullptr ? ones.data() : t.b_weights;
  Workspace column_loss(kColumns ? units * t.m : 0);
  Workspace column_dthreshold(t.per_column ? units * t.m : 0);
  Workspace row_dthreshold(t.n);

  parallel_chunks(units, threads, [&](int64_t unit, int) {
    const int64_t end = t.n < (unit + 1) * kRowsPerUnit ? t.n : (unit + 1) * kRowsPerUnit;
    float* columns = kColumns ? column_loss.data() + unit * t.m : nullptr;
    float* thresholds = t.per_column ? column_dthreshold.data() + unit * t.m : nullptr;
    for (int64_t i = unit * kRowsPerUnit; i < end; ++i) {
      Gradient* gradient = kGradient ? static_cast<Gradient*>(t.gradient) + i * t.stride : nullptr;
      if (t.a_labels[i] < 0) {
        if (kGradient) {
          for (int64_t j = 0; j < t.m; ++j) gradient[j] = round_to<Gradient>(0.0f);
        }
        continue;
      }
      const RowSums sums =
          t.per_column ? per_column_row<kGradient, kColumns>(policy, t, i, gradient, weights,
                                                             columns, thresholds)
                       : scalar_row<kGradient, kColumns>(policy, t, i, gradient, weights, columns);
      t.a_loss[i] += sums.loss;
      row_dthreshold.data()[i] = sums.dthreshold;
    }
  });

  for (int64_t unit = 0; kColumns && unit < units; ++unit) {
    for (int64_t j = 0; j < t.m; ++j) t.b_loss[j] += column_loss[unit * t.m + j];
  }
  for (int64_t unit = 0; column_thresholds && unit < units; ++unit) {
    for (int64_t j = 0; j < t.m; ++j) t.b_dthreshold[j] += column_dthreshold[unit * t.m + j];
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

template <bool kGradient, class Gradient, class Policy>
void sum_tile(const Policy policy, const SumTile& t, int threads) {
  if (t.b_loss != nullptr) {
    sum_tile<kGradient, true, Gradient>(policy, t, threads);
  } else {
    sum_tile<kGradient, false, Gradient>(policy, t, threads);
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
