// Epilogues of a `logsumexp` loss over samples: any number of positives per row.
//
// A tile of a batch serves both directions of its pairs. Statistics of the columns are kept per
// unit of rows and folded in order, so that results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/elements.h"
#include "cpu/loss_kernels.h"
#include "cpu/pool.h"
#include "cpu/sum_tile.h"
#include "unitsface/pair_logit.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// exp(z - shift) is near 0 for z = -inf, even if every value so far was -inf.
inline float finite_shift(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// Folds sum = sum of exp(z - highest) into a running maximum and total. The sums carry NaN.
inline void fold_log_sum(float highest, float sum, float* maximum, float* total) {
  if (highest == -INFINITY && sum == sum) return;  // only excluded pairs
  const float previous = *maximum;
  *maximum = highest > previous ? highest : previous;
  const float kept = *total == 0.0f ? 0.0f : *total * exp_clamped(previous - *maximum);
  *total = kept + sum * exp_clamped(highest - *maximum);
}

// Logits of one row's negatives, in place, -inf for every other pair; returns the largest.
template <class Policy>
float negative_logits_row(const Policy policy, float* __restrict row, int32_t label,
                          const int32_t* __restrict labels, int32_t m, int32_t skipped) {
  float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
  for (int32_t j = 0; j < m; ++j) {
    const int32_t other = labels[j];
    const bool counted = (other >= 0) & (other != label) & (j != skipped);
    const float z = counted ? policy.negative(row[j]).value : -INFINITY;
    row[j] = z;
    highest = z > highest ? z : highest;
  }
  return highest;
}

// Maximum and sum of exponentials of each column over `rows` rows of logits.
inline void log_sum_columns(const float* logits, int64_t rows, int64_t stride, int32_t m,
                            float* __restrict maximum, float* __restrict sum) {
  for (int32_t j = 0; j < m; ++j) maximum[j] = -INFINITY;
  for (int64_t i = 0; i < rows; ++i) {
    const float* __restrict row = logits + i * stride;
#pragma omp simd
    for (int32_t j = 0; j < m; ++j) maximum[j] = row[j] > maximum[j] ? row[j] : maximum[j];
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* __restrict row = logits + i * stride;
#pragma omp simd
    for (int32_t j = 0; j < m; ++j) sum[j] += exp_clamped(row[j] - finite_shift(maximum[j]));
  }
}

template <class Policy>
void pair_negatives_tile(const Policy policy, const PairNegatives& t, int threads) {
  const int64_t units = (t.n + kRowsPerUnit - 1) / kRowsPerUnit;
  const bool both = t.b_maximum != nullptr;
  const int32_t m = static_cast<int32_t>(t.m);
  Workspace maxima(both ? units * t.m : 0);
  Workspace sums(both ? units * t.m : 0);
  parallel_chunks(units, threads, [&](int64_t unit, int) {
    const int64_t first = unit * kRowsPerUnit;
    const int64_t end = t.n < first + kRowsPerUnit ? t.n : first + kRowsPerUnit;
    for (int64_t i = first; i < end; ++i) {
      float* __restrict row = t.cosines + i * t.stride;
      if (t.a_labels[i] < 0) {
        for (int32_t j = 0; j < m; ++j) row[j] = -INFINITY;
        continue;
      }
      const float highest = negative_logits_row(policy, row, t.a_labels[i], t.b_labels, m,
                                                excluded_column(i, t.diagonal, t.m));
      const float shift = finite_shift(highest);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int32_t j = 0; j < m; ++j) sum += exp_clamped(row[j] - shift);
      fold_log_sum(highest, sum, t.a_maximum + i, t.a_total + i);
    }
    if (both) {
      log_sum_columns(t.cosines + first * t.stride, end - first, t.stride, m,
                      maxima.data() + unit * t.m, sums.data() + unit * t.m);
    }
  });
  for (int64_t unit = 0; both && unit < units; ++unit) {
    for (int64_t j = 0; j < t.m; ++j) {
      fold_log_sum(maxima[unit * t.m + j], sums[unit * t.m + j], t.b_maximum + j, t.b_total + j);
    }
  }
}

// Adds the positives of row i to its own sums and, with kBoth, to those of the columns.
template <bool kBoth, class Policy>
void positives_row(const Policy policy, const PairPositives& t, int64_t i,
                   float* __restrict column_loss, float* __restrict column_negative_prob) {
  const float* __restrict cosine = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const float* __restrict b_log_negatives = t.b_log_negatives;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  const int32_t count = static_cast<int32_t>(t.m);
  const float log_negatives = t.a_log_negatives[i];
  float loss = 0.0f, negative_prob = 0.0f;
#pragma omp simd reduction(+ : loss, negative_prob)
  for (int32_t j = 0; j < count; ++j) {
    const bool counted = (labels[j] == label) & (j != skipped);
    const float z = policy.positive(cosine[j]).value;
    const Softplus forth = softplus(log_negatives - z);
    loss += counted ? forth.value : 0.0f;
    negative_prob += counted ? forth.sigmoid : 0.0f;
    if (kBoth) {
      const Softplus back = softplus(b_log_negatives[j] - z);
      column_loss[j] += counted ? back.value : 0.0f;
      column_negative_prob[j] += counted ? back.sigmoid : 0.0f;
    }
  }
  t.a_loss[i] += loss;
  t.a_negative_prob[i] += negative_prob;
}

template <bool kBoth, class Policy>
void pair_positives_tile(const Policy policy, const PairPositives& t, int threads) {
  const int64_t units = (t.n + kRowsPerUnit - 1) / kRowsPerUnit;
  Workspace losses(kBoth ? units * t.m : 0);
  Workspace negative_probs(kBoth ? units * t.m : 0);
  parallel_chunks(units, threads, [&](int64_t unit, int) {
    const int64_t end = t.n < (unit + 1) * kRowsPerUnit ? t.n : (unit + 1) * kRowsPerUnit;
    for (int64_t i = unit * kRowsPerUnit; i < end; ++i) {
      if (t.a_labels[i] < 0) continue;
      positives_row<kBoth>(policy, t, i, losses.data() + (kBoth ? unit * t.m : 0),
                           negative_probs.data() + (kBoth ? unit * t.m : 0));
    }
  });
  for (int64_t unit = 0; kBoth && unit < units; ++unit) {
    for (int64_t j = 0; j < t.m; ++j) {
      t.b_loss[j] += losses[unit * t.m + j];
      t.b_negative_prob[j] += negative_probs[unit * t.m + j];
    }
  }
}

template <class Policy>
void pair_positives_tile(const Policy policy, const PairPositives& t, int threads) {
  if constexpr (Policy::kPositives) {
    if (t.b_loss != nullptr) {
      pair_positives_tile<true>(policy, t, threads);
    } else {
      pair_positives_tile<false>(policy, t, threads);
    }
  }
}

template <bool kBoth, class Gradient, class Policy>
void pair_gradient_row(const Policy policy, const PairGradient& t, int64_t i) {
  const float* cosine = t.cosines + i * t.stride;
  Gradient* gradient = static_cast<Gradient*>(t.gradient) + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const float* __restrict b_log_negatives = t.b_log_negatives;
  const float* __restrict b_negative = t.b_negative_weight;
  const float* __restrict b_positive = t.b_positive_weight;
  const int32_t label = t.a_labels[i], m = static_cast<int32_t>(t.m);
  const int32_t skipped = excluded_column(i, t.diagonal, t.m);
  const float log_negatives = t.a_log_negatives[i];
  const float negative = t.a_negative_weight[i], positive = t.a_positive_weight[i];
  // The gradient may lie over the cosines, element by element.
#pragma omp simd
  for (int32_t j = 0; j < m; ++j) {
    const int32_t other = labels[j];
    const bool same = other == label;
    const Logit z = pair_logit(policy, cosine[j], same);
    float slope = pair_slope(z.value - log_negatives, same, negative, positive);
    if (kBoth)
      slope += pair_slope(z.value - b_log_negatives[j], same, b_negative[j], b_positive[j]);
    const bool counted = (other >= 0) & (j != skipped) & (Policy::kPositives | !same);
    gradient[j] = round_to<Gradient>(counted ? slope * z.dcosine : 0.0f);
  }
}

template <class Gradient, class Policy>
void pair_gradient_tile(const Policy policy, const PairGradient& t, int threads) {
  const bool both = t.b_log_negatives != nullptr;
  parallel_rows(t.n, t.m, threads, [&](int64_t i) {
    if (t.a_labels[i] < 0) {
      Gradient* gradient = static_cast<Gradient*>(t.gradient) + i * t.stride;
      for (int64_t j = 0; j < t.m; ++j) gradient[j] = round_to<Gradient>(0.0f);
    } else if (both) {
      pair_gradient_row<true, Gradient>(policy, t, i);
    } else {
      pair_gradient_row<false, Gradient>(policy, t, i);
    }
  });
}

template <class Policy>
void pair_gradient_tile(const Policy policy, const PairGradient& t, int threads) {
  if (t.gradient_dtype == DType::kBFloat16) {
    pair_gradient_tile<BFloat16>(policy, t, threads);
  } else {
    pair_gradient_tile<float>(policy, t, threads);
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
