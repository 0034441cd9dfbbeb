// Variables of a policy in the loops over a tile's pairs.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "unitsface/macros.h"
#include "unitsface/policy.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

template <class Body, int... k>
UF_HOST_DEVICE void each(std::integer_sequence<int, k...>, const Body& body) {
  (body(std::integral_constant<int, k>()), ...);
}

// body(k) for the constants 0 <= k < kCount.
template <int kCount, class Body>
UF_HOST_DEVICE void each(const Body& body) {
  each(std::make_integer_sequence<int, kCount>(), body);
}

// Variables as the pairs of a tile read them: matrices with a row for each variable.
template <class Policy>
struct Variables {
  using V = VariablesOf<Policy>;
  const float* scalars;
  const float* rows;
  int64_t row_stride;
  const float* columns;
  int64_t column_stride;

  // Of the pair of `row` and `column`.
  UF_HOST_DEVICE Values<V::kCount> at(int64_t row, int64_t column) const {
    Values<V::kCount> v;
    each<V::kScalars>([&](auto k) { v.value[k] = scalars[k]; });
    each<V::kRows>([&](auto k) { v.value[V::kScalars + k] = rows[k * row_stride + row]; });
    each<V::kColumns>(
        [&](auto k) { v.value[V::kScalars + V::kRows + k] = columns[k * column_stride + column]; });
    return v;
  }
};

// Derivatives by variables are kept for a block of columns before they are added up.
constexpr int64_t kSlopeBlock = 256;

inline float sum_of(const float* values, int32_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int32_t k = 0; k < count; ++k) sum += values[k];
  return sum;
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
