// Gradients of log-sum-exp losses over samples, see logsumexp_pairs_tile.h.
#pragma once

#include <cstdint>

#include "cpu/elements.h"
#include "cpu/lanes.h"
#include "cpu/logit_at.h"
#include "cpu/loss_kernels.h"
#include "cpu/pool.h"
#include "cpu/sum_tile.h"
#include "cpu/units.h"
#include "cpu/variables.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// d loss / d logit of one direction of a pair, whose row has these sums and weights.
template <bool kTwo>
UF_HOST_DEVICE float slope_of(float z, bool positive, float log_negatives, float log_positives,
                              float negative_weight, float positive_weight) {
  if (kTwo) {
    return pair_slope_of_two(z, positive, log_negatives, log_positives, negative_weight,
                             positive_weight);
  }
  return pair_slope(z - log_negatives, positive, negative_weight, positive_weight);
}

template <bool kTwo, bool kBoth, class Gradient, class Policy>
void pair_gradient_row(const Policy policy, const PairGradient& t, int64_t i) {
  const float* cosine = t.cosines + i * t.stride;
  Gradient* gradient = static_cast<Gradient*>(t.gradient) + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const float* __restrict b_log_negatives = t.b_log_negatives;
  const float* __restrict b_negative = t.b_negative_weight;
  const float* __restrict b_positive = t.b_positive_weight;
  const float* __restrict b_log_positives = t.b_log_positives;
  const int32_t label = t.a_labels[i], m = static_cast<int32_t>(t.m);
  const int32_t skipped = excluded_column(i, t.diagonal, t.m);
  const float log_negatives = t.a_log_negatives[i];
  const float negative = t.a_negative_weight[i], positive = t.a_positive_weight[i];
  const float log_positives = kTwo ? t.a_log_positives[i] : 0.0f;
  // The gradient may lie over the cosines, element by element.
#pragma omp simd
  for (int32_t j = 0; j < m; ++j) {
    const int32_t other = labels[j];
    const bool same = other == label;
    const Logit z = pair_logit(policy, cosine[j], same);
    float slope = slope_of<kTwo>(z.value, same, log_negatives, log_positives, negative, positive);
    if (kBoth)
      slope += slope_of<kTwo>(z.value, same, b_log_negatives[j], kTwo ? b_log_positives[j] : 0.0f,
                              b_negative[j], b_positive[j]);
    const bool counted = (other >= 0) & (j != skipped) & (Policy::kPositives | !same);
    gradient[j] = round_to<Gradient>(counted ? slope * z.dcosine : 0.0f);
  }
}

// The same of a policy with variables. With kSlopes = 1 derivatives of the row's direction by what
// it gives to its pairs are added to `own` [kCount], and those by variables of columns to `sums`
// [kRows + kColumns, m]; with 2 also those of the other direction.
template <bool kTwo, bool kBoth, int kSlopes, class Gradient, class Policy>
void variable_gradient_row(const Policy policy, const PairGradient& t, int64_t i,
                           float* __restrict sums, float* __restrict own) {
  using V = VariablesOf<Policy>;
  const float* cosine = t.cosines + i * t.stride;
  Gradient* gradient = static_cast<Gradient*>(t.gradient) + i * t.stride;
  const int32_t* __restrict labels = t.b_labels;
  const float* __restrict b_log_negatives = t.b_log_negatives;
  const float* __restrict b_negative = t.b_negative_weight;
  const float* __restrict b_positive = t.b_positive_weight;
  const float* __restrict b_log_positives = t.b_log_positives;
  const int32_t label = t.a_labels[i], skipped = excluded_column(i, t.diagonal, t.m);
  const float log_negatives = t.a_log_negatives[i];
  const float negative = t.a_negative_weight[i], positive = t.a_positive_weight[i];
  const float log_positives = kTwo ? t.a_log_positives[i] : 0.0f;
  const Variables<Policy> forwards = forward_variables<Policy>(t);
  const Variables<Policy> backwards = backward_variables<Policy>(t);
  constexpr bool kApart = kBoth && kDirected<Policy>;
  float slopes[V::kCount * kLanes] = {};
  each_lane(0, static_cast<int32_t>(t.m), [&](int32_t j, int32_t lane) UF_INLINED {
    const int32_t other = labels[j];
    const bool same = other == label;
    const bool counted = (other >= 0) & (j != skipped) & (Policy::kPositives | !same);
    const auto forth = logit_at(policy, cosine[j], same, forwards, i, j);
    const float share =
        slope_of<kTwo>(forth.value, same, log_negatives, log_positives, negative, positive);
    float slope = share * forth.dcosine, other_share = 0.0f;
    auto back = forth;
    if constexpr (kBoth) {
      if constexpr (kDirected<Policy>) back = logit_at(policy, cosine[j], same, backwards, j, i);
      other_share = slope_of<kTwo>(back.value, same, b_log_negatives[j],
                                   kTwo ? b_log_positives[j] : 0.0f, b_negative[j], b_positive[j]);
      slope += other_share * back.dcosine;
    }
    // Not `counted ? slope : 0`: the compiler would branch around the rounding of a 0.
    gradient[j] = round_to<Gradient>(choose(all_bits(counted), slope, 0.0f));
    if constexpr (kSlopes > 0) {
      each<V::kScalars>([&](auto v) {
        float sum = share * forth.slope[v];
        if constexpr (kSlopes > 1) sum += other_share * back.slope[v];
        slopes[v * kLanes + lane] += counted ? sum : 0.0f;
      });
      each<V::kRows>([&](auto r) {
        constexpr int v = V::kScalars + r;
        slopes[v * kLanes + lane] += counted ? share * forth.slope[v] : 0.0f;
        if constexpr (kSlopes > 1) {
          sums[r * t.m + j] += counted ? other_share * back.slope[v] : 0.0f;
        }
      });
      each<V::kColumns>([&](auto c) {
        constexpr int v = V::kScalars + V::kRows + c;
        sums[(V::kRows + c) * t.m + j] += counted ? share * forth.slope[v] : 0.0f;
        if constexpr (kSlopes > 1) {
          slopes[v * kLanes + lane] += counted ? other_share * back.slope[v] : 0.0f;
        }
      });
    }
  });
  if constexpr (kSlopes > 0) {
    each<V::kCount>([&](auto v) { own[v] = sum_of(slopes + v * kLanes, kLanes); });
  }
}

template <class Gradient>
void clear_row(const PairGradient& t, int64_t i) {
  Gradient* gradient = static_cast<Gradient*>(t.gradient) + i * t.stride;
  for (int64_t j = 0; j < t.m; ++j) gradient[j] = round_to<Gradient>(0.0f);
}

template <bool kTwo, bool kBoth, int kSlopes, class Gradient, class Policy>
void variable_gradient_tile(const Policy policy, const PairGradient& t, int threads) {
  using V = VariablesOf<Policy>;
  const int64_t units = units_of(t.n);
  const int64_t width = kSlopes > 0 ? (V::kRows + V::kColumns) * t.m : 0;
  const int64_t count = kSlopes > 0 ? V::kCount : 0;
  Workspace columns(units * width), own(count * t.n);
  parallel_units(t.n, t.m, threads, [&](int64_t unit, int64_t first, int64_t end, int) {
    for (int64_t i = first; i < end; ++i) {
      if (t.a_labels[i] < 0) {
        clear_row<Gradient>(t, i);
      } else {
        variable_gradient_row<kTwo, kBoth, kSlopes, Gradient>(
            policy, t, i, columns.data() + unit * width, own.data() + i * count);
      }
    }
  });
  if constexpr (kSlopes > 0) {
    add_to_gradients<Policy, (kSlopes > 1)>(t, own.data(), [&](double* total, int64_t which) {
      for (int64_t unit = 0; unit < units; ++unit) {
        for (int64_t j = 0; j < t.m; ++j) total[j] += columns[unit * width + which * t.m + j];
      }
    });
  }
}

template <bool kTwo, class Gradient, class Policy>
void pair_gradient_tile(const Policy policy, const PairGradient& t, int threads) {
  if (kTwo) require_positives(t);
  const bool both = t.b_log_negatives != nullptr;
  if constexpr (VariablesOf<Policy>::kCount > 0) {
    const bool wanted = t.d_scalars != nullptr || t.a_drows != nullptr || t.b_dcolumns != nullptr;
    if (!both) {
      (wanted ? variable_gradient_tile<kTwo, false, 1, Gradient, Policy>
              : variable_gradient_tile<kTwo, false, 0, Gradient, Policy>)(policy, t, threads);
    } else if (!wanted) {
      variable_gradient_tile<kTwo, true, 0, Gradient>(policy, t, threads);
    } else if (!t.both_slopes) {
      variable_gradient_tile<kTwo, true, 1, Gradient>(policy, t, threads);
    } else {
      variable_gradient_tile<kTwo, true, 2, Gradient>(policy, t, threads);
    }
  } else {
    parallel_rows(t.n, t.m, threads, [&](int64_t i) {
      if (t.a_labels[i] < 0) {
        clear_row<Gradient>(t, i);
      } else if (both) {
        pair_gradient_row<kTwo, true, Gradient>(policy, t, i);
      } else {
        pair_gradient_row<kTwo, false, Gradient>(policy, t, i);
      }
    });
  }
}

template <bool kTwo, class Policy>
void pair_gradient_tile(const Policy policy, const PairGradient& t, int threads) {
  if (t.gradient_dtype == DType::kBFloat16) {
    pair_gradient_tile<kTwo, BFloat16>(policy, t, threads);
  } else {
    pair_gradient_tile<kTwo, float>(policy, t, threads);
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
