// Epilogues of log-sum-exp losses over samples: any number of positives per row. With kTwo these
// have a log-sum-exp of their own.
//
// A tile of a batch serves both directions of its pairs. Statistics of the columns are kept per
// unit of rows and folded in order, so that results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "cpu/elements.h"
#include "cpu/logit_at.h"
#include "cpu/loss_kernels.h"
#include "cpu/sum_tile.h"
#include "cpu/units.h"
#include "cpu/variables.h"

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

struct Highest {
  float negative, positive;
};

// Logits of row i's pairs, -inf for those that take no part, and the largest ones: in place of the
// cosines or, with kBack, those of the other direction to `apart`. With kTwo positives have a
// log-sum-exp of their own; without, they take no part.
template <bool kTwo, bool kBack, class Policy>
Highest logits_row(const Policy policy, float* __restrict row, int32_t label,
                   const int32_t* __restrict labels, int32_t m, int32_t skipped,
                   const Variables<Policy>& v, int64_t i, float* apart) {
  float* logits = kBack ? apart : row;
  float highest = -INFINITY, highest_positive = -INFINITY;
#pragma omp simd reduction(max : highest, highest_positive)
  for (int32_t j = 0; j < m; ++j) {
    const int32_t other = labels[j];
    const bool same = other == label;
    const bool counted = (other >= 0) & ((kTwo & Policy::kPositives) | !same) & (j != skipped);
    const int64_t first = kBack ? j : i, second = kBack ? i : j;
    const float value = kTwo ? logit_at(policy, row[j], same, v, first, second).value
                             : negative_at(policy, row[j], v, first, second).value;
    const float z = counted ? value : -INFINITY;
    logits[j] = z;
    const float negative = kTwo & same ? -INFINITY : z;
    highest = negative > highest ? negative : highest;
    if (kTwo) {
      const float positive = same ? z : -INFINITY;
      highest_positive = positive > highest_positive ? positive : highest_positive;
    }
  }
  return {highest, highest_positive};
}

// Folds the logits of row i into its running values.
template <bool kTwo>
void fold_row(const PairNegatives& t, int64_t i, Highest highest) {
  const float* __restrict row = t.cosines + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const int32_t label = t.a_labels[i], m = static_cast<int32_t>(t.m);
  const float shift = finite_shift(highest.negative);
  const float shift_of_positives = finite_shift(highest.positive);
  float sum = 0.0f, sum_of_positives = 0.0f;
#pragma omp simd reduction(+ : sum, sum_of_positives)
  for (int32_t j = 0; j < m; ++j) {
    const bool positive = kTwo && labels[j] == label;
    const float e = exp_clamped(row[j] - (positive ? shift_of_positives : shift));
    sum += positive ? 0.0f : e;
    if (kTwo) sum_of_positives += positive ? e : 0.0f;
  }
  fold_log_sum(highest.negative, sum, t.a_maximum + i, t.a_total + i);
  if (kTwo) {
    fold_log_sum(highest.positive, sum_of_positives, t.a_positive_maximum + i,
                 t.a_positive_total + i);
  }
}

// Logits of a tile's rows from `first` on, as the columns' statistics take them.
struct UnitLogits {
  const float* data;
  int64_t stride;
  int64_t first, end;  // rows of the tile
};

// Maximum and sum of exponentials of each column over a unit's logits, of its negatives or, with
// kPositive, of its positives. Without kTwo the rows have no others.
template <bool kTwo, bool kPositive>
void log_sum_columns(const PairNegatives& t, const UnitLogits& unit, float* __restrict maximum,
                     float* __restrict sum) {
  const int32_t* __restrict labels = t.b_labels;
  const int32_t m = static_cast<int32_t>(t.m);
  for (int32_t j = 0; j < m; ++j) maximum[j] = -INFINITY;
  for (int64_t i = unit.first; i < unit.end; ++i) {
    const float* __restrict row = unit.data + (i - unit.first) * unit.stride;
    const int32_t label = t.a_labels[i];
#pragma omp simd
    for (int32_t j = 0; j < m; ++j) {
      const float z = !kTwo || (labels[j] == label) == kPositive ? row[j] : -INFINITY;
      maximum[j] = z > maximum[j] ? z : maximum[j];
    }
  }
  for (int64_t i = unit.first; i < unit.end; ++i) {
    const float* __restrict row = unit.data + (i - unit.first) * unit.stride;
    const int32_t label = t.a_labels[i];
#pragma omp simd
    for (int32_t j = 0; j < m; ++j) {
      const float z = !kTwo || (labels[j] == label) == kPositive ? row[j] : -INFINITY;
      sum[j] += exp_clamped(z - finite_shift(maximum[j]));
    }
  }
}

template <bool kTwo, class Policy>
void pair_negatives_tile(const Policy policy, const PairNegatives& t, int threads) {
  if (kTwo) require_positives(t);
  const int64_t units = units_of(t.n);
  const bool both = t.b_maximum != nullptr;
  const int32_t m = static_cast<int32_t>(t.m);
  const int64_t kinds = kTwo ? 2 : 1;
  Workspace maxima(both ? kinds * units * t.m : 0);
  Workspace sums(both ? kinds * units * t.m : 0);
  // Logits of the other direction, of a unit at a time.
  const bool directed = kDirected<Policy> && both;
  const int64_t elements = directed ? kRowsPerUnit * t.m : 0;
  Workspace others(elements * threads);
  parallel_units(t.n, t.m, threads, [&](int64_t unit, int64_t first, int64_t end, int slot) {
    float* other = others.data() + slot * elements;
    for (int64_t i = first; i < end; ++i) {
      float* __restrict row = t.cosines + i * t.stride;
      if (t.a_labels[i] < 0) {
        for (int32_t j = 0; j < m; ++j) row[j] = -INFINITY;
        for (int32_t j = 0; directed && j < m; ++j) other[(i - first) * t.m + j] = -INFINITY;
        continue;
      }
      const int32_t skipped = excluded_column(i, t.diagonal, t.m);
      if constexpr (kDirected<Policy>) {
        if (directed) {
          logits_row<kTwo, true>(policy, row, t.a_labels[i], t.b_labels, m, skipped,
                                 backward_variables<Policy>(t), i, other + (i - first) * t.m);
        }
      }
      fold_row<kTwo>(
          t, i,
          logits_row<kTwo, false>(policy, row, t.a_labels[i], t.b_labels, m, skipped,
                                  forward_variables<Policy>(t), i, static_cast<float*>(nullptr)));
    }
    if (!both) return;
    UnitLogits logits{t.cosines + first * t.stride, t.stride, first, end};
    if (directed) logits.data = other, logits.stride = t.m;
    log_sum_columns<kTwo, false>(t, logits, maxima.data() + unit * t.m, sums.data() + unit * t.m);
    if constexpr (kTwo) {
      log_sum_columns<kTwo, true>(t, logits, maxima.data() + (units + unit) * t.m,
                                  sums.data() + (units + unit) * t.m);
    }
  });
  const auto fold_columns = [&](int64_t kind, float* maximum, float* total) {
    for (int64_t unit = kind * units; unit < (kind + 1) * units; ++unit) {
      for (int64_t j = 0; j < t.m; ++j) {
        fold_log_sum(maxima[unit * t.m + j], sums[unit * t.m + j], maximum + j, total + j);
      }
    }
  };
  if (!both) return;
  fold_columns(0, t.b_maximum, t.b_total);
  if (kTwo) fold_columns(1, t.b_positive_maximum, t.b_positive_total);
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
  const Variables<Policy> forwards = forward_variables<Policy>(t);
  const Variables<Policy> backwards = backward_variables<Policy>(t);
  float loss = 0.0f, negative_prob = 0.0f;
#pragma omp simd reduction(+ : loss, negative_prob)
  for (int32_t j = 0; j < count; ++j) {
    const bool counted = (labels[j] == label) & (j != skipped);
    const float z = positive_at(policy, cosine[j], forwards, i, j).value;
    const Softplus forth = softplus(log_negatives - z);
    loss += counted ? forth.value : 0.0f;
    negative_prob += counted ? forth.sigmoid : 0.0f;
    if (kBoth) {
      float other = z;
      if constexpr (kDirected<Policy>) {
        other = positive_at(policy, cosine[j], backwards, j, i).value;
      }
      const Softplus back = softplus(b_log_negatives[j] - other);
      column_loss[j] += counted ? back.value : 0.0f;
      column_negative_prob[j] += counted ? back.sigmoid : 0.0f;
    }
  }
  t.a_loss[i] += loss;
  t.a_negative_prob[i] += negative_prob;
}

template <bool kBoth, class Policy>
void pair_positives_tile(const Policy policy, const PairPositives& t, int threads) {
  const int64_t units = units_of(t.n);
  Workspace losses(kBoth ? units * t.m : 0);
  Workspace negative_probs(kBoth ? units * t.m : 0);
  parallel_units(t.n, t.m, threads, [&](int64_t unit, int64_t first, int64_t end, int) {
    for (int64_t i = first; i < end; ++i) {
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

}  // namespace UF_ISA
}  // namespace unitsface::cpu
