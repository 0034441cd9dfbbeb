// Division of rows by their norms, and its Jacobian, in float32 (the caller converts sources); unit
// rows may be rounded to bfloat16.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cpu/elements.h"
#include "cpu/pool.h"
#include "unitsface/macros.h"
#include "unitsface/tile_args.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

inline int64_t source_row(const int64_t* index, int64_t start, int64_t i) {
  return index == nullptr ? start + i : index[i];
}

// 1 / norm of a row whose squares overflow or are NaN; NaN if an element is not finite.
inline float inverse_of_extreme(const float* x, int64_t d) {
  float squares = 0.0f;
  for (int64_t k = 0; k < d; ++k) squares += (x[k] * kShrink) * (x[k] * kShrink);
  // A difference of infinities or NaN is NaN. The value is above the denormals, which may be
  // flushed to 0.
  const float inverse = kShrink / std::sqrt(squares) + (squares - squares);
  return inverse < FLT_MIN ? FLT_MIN : inverse;
}

template <class Unit>
void normalize_rows_as(const NormalizeRowsArgs& t, int threads) {
  parallel_rows(t.n, t.d, threads, [&](int64_t i) {
    const float* __restrict x =
        static_cast<const float*>(t.source) + source_row(t.index, t.start, i) * t.d;
    Unit* __restrict unit = static_cast<Unit*>(t.unit) + i * t.d;
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < t.d; ++k) squares += x[k] * x[k];
    const float norm = std::sqrt(squares);
    float inverse = 1.0f / (norm < kNormEps ? kNormEps : norm);
    if (!(squares <= FLT_MAX)) inverse = inverse_of_extreme(x, t.d);
    t.inverse_norms[i] = inverse;
#pragma omp simd
    for (int64_t k = 0; k < t.d; ++k) unit[k] = round_to<Unit>(x[k] * inverse);
  });
}

inline void normalize_rows(const NormalizeRowsArgs& t, int threads) {
  if (t.unit_dtype == DType::kBFloat16) {
    normalize_rows_as<BFloat16>(t, threads);
  } else {
    normalize_rows_as<float>(t, threads);
  }
}

// The same for a row whose norm is so large that g x would overflow.
inline void extreme_row_backward(const float* g, const float* x, float* out, int64_t d,
                                 float inverse, float scale) {
  float along = 0.0f;
  for (int64_t k = 0; k < d; ++k) along += g[k] * (x[k] * inverse);
  for (int64_t k = 0; k < d; ++k) out[k] = scale * inverse * (g[k] - along * (x[k] * inverse));
}

inline void normalize_rows_backward(const NormalizeRowsBackwardArgs& t, int threads) {
  const float scale = t.scale == nullptr ? 1.0f : *t.scale;
  parallel_rows(t.n, t.d, threads, [&](int64_t i) {
    const float* x = static_cast<const float*>(t.source) + source_row(t.index, t.start, i) * t.d;
    const float* g = t.d_unit + i * t.d;
    float* out = static_cast<float*>(t.out) + i * t.d;  // may be g
    const float inverse = t.inverse_norms[i];
    if (inverse < kSmallInverse) {
      extreme_row_backward(g, x, out, t.d, inverse, scale);
      return;
    }
    float along = 0.0f;
#pragma omp simd reduction(+ : along)
    for (int64_t k = 0; k < t.d; ++k) along += g[k] * x[k];
    // A clamped norm is a constant: the component along the row stays.
    along = inverse < 1.0f / kNormEps ? along * inverse * inverse : 0.0f;
#pragma omp simd
    for (int64_t k = 0; k < t.d; ++k) out[k] = scale * inverse * (g[k] - along * x[k]);
  });
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
