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
  // Copies: neighbors in memory would be loaded as one vector, which loops over pairs do not take.
  Values<V::kScalars + 1> scalars;
  const float* rows;
  int64_t row_stride;
  const float* columns;
  int64_t column_stride;

  // Values for the pair of `row` and `column`.
  UF_HOST_DEVICE Values<V::kCount> at(int64_t row, int64_t column) const {
    Values<V::kCount> v;
    each<V::kScalars>([&](auto k) { v.value[k] = scalars.value[k]; });
    each<V::kRows>([&](auto k) { v.value[V::kScalars + k] = rows[k * row_stride + row]; });
    each<V::kColumns>(
        [&](auto k) { v.value[V::kScalars + V::kRows + k] = columns[k * column_stride + column]; });
    return v;
  }
};

template <class Policy>
UF_HOST_DEVICE Values<VariablesOf<Policy>::kScalars + 1> scalars_of(const float* scalars) {
  Values<VariablesOf<Policy>::kScalars + 1> v{};
  each<VariablesOf<Policy>::kScalars>([&](auto k) { v.value[k] = scalars[k]; });
  return v;
}

// Variables of a tile, and those that the other direction of its pairs reads.
template <class Policy, class Tile>
UF_HOST_DEVICE Variables<Policy> forward_variables(const Tile& t) {
  return {scalars_of<Policy>(t.scalars), t.a_rows, t.row_stride, t.b_columns, t.column_stride};
}

template <class Policy, class Tile>
UF_HOST_DEVICE Variables<Policy> backward_variables(const Tile& t) {
  return {scalars_of<Policy>(t.scalars), t.b_rows, t.row_stride, t.a_columns, t.column_stride};
}

// Whether the directions of a pair differ.
template <class Policy>
constexpr bool kDirected = (VariablesOf<Policy>::kRows + VariablesOf<Policy>::kColumns) > 0;

// Adds derivatives to a tile's gradients of variables, with kBack those of both directions: `own`
// [n, kCount], by what row i gives to its pairs, and what add_columns(sums, k) adds to sums [m], by
// variable k of what columns give: those of rows first.
template <class Policy, bool kBack, class Tile, class AddColumns>
void add_to_gradients(const Tile& t, const float* own, const AddColumns& add_columns) {
  using V = VariablesOf<Policy>;
  for (int64_t r = 0; r < V::kRows; ++r) {
    if (kBack && t.b_drows != nullptr) add_columns(t.b_drows + r * t.row_stride, r);
  }
  for (int64_t c = 0; c < V::kColumns; ++c) {
    if (t.b_dcolumns != nullptr) add_columns(t.b_dcolumns + c * t.column_stride, V::kRows + c);
  }
  for (int64_t i = 0; i < t.n; ++i) {
    for (int v = 0; v < V::kCount; ++v) {
      const int r = v - V::kScalars, c = r - V::kRows;
      const float sum = own[i * V::kCount + v];
      if (r < 0) {
        if (t.d_scalars != nullptr) t.d_scalars[v] += sum;
      } else if (c < 0) {
        if (t.a_drows != nullptr) t.a_drows[r * t.row_stride + i] += sum;
      } else if (kBack && t.a_dcolumns != nullptr) {
        t.a_dcolumns[c * t.column_stride + i] += sum;
      }
    }
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
