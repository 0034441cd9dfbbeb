// An optimizer step on rows of a matrix. Every row goes through the same loop: the distribution of
// rows over calls and threads does not change a bit.
#pragma once

#include <cstdint>

#include "cpu/pool.h"
#include "unitsface/row_update.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

template <class Rule>
void update_rows_by(const UpdateRowsArgs& t, int threads) {
  const Rule rule(t);
  const float scale = t.gradient_scale == nullptr ? 1.0f : *t.gradient_scale;
  parallel_rows(t.n, t.d, threads, [&](int64_t i) {
    const int64_t row = (t.index == nullptr ? t.start + i : t.index[i]) * t.d;
    const float* __restrict gradient = t.gradient + i * t.d;
    float* __restrict weight = t.weight + row;
    if constexpr (Rule::kStates == 0) {
#pragma omp simd
      for (int64_t k = 0; k < t.d; ++k) rule(weight[k], scale * gradient[k]);
    } else {
      float* __restrict first = t.first + row;
      if constexpr (Rule::kStates == 1) {
#pragma omp simd
        for (int64_t k = 0; k < t.d; ++k) rule(weight[k], scale * gradient[k], first[k]);
      } else {
        float* __restrict second = t.second + row;
#pragma omp simd
        for (int64_t k = 0; k < t.d; ++k) {
          rule(weight[k], scale * gradient[k], first[k], second[k]);
        }
      }
    }
  });
}

inline void update_rows(const UpdateRowsArgs& t, int threads) {
  if (t.rule == RowRule::kAdamW) {
    update_rows_by<AdamW>(t, threads);
  } else if (t.first != nullptr) {
    update_rows_by<MomentumSgd>(t, threads);
  } else {
    update_rows_by<Sgd>(t, threads);
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
