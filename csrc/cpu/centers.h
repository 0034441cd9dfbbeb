// Classes of several centers: the largest product of each, and its gradient back to where it was.
#pragma once

#include <cstdint>

#include "cpu/pool.h"
#include "unitsface/macros.h"
#include "unitsface/tile_args.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// Classes whose results lie in registers and the nearest cache until they are stored.
constexpr int64_t kCenterBlock = 64;

// `Centers`: how many, known to the compiler, or 0: `centers`.
template <int Centers>
UF_HOST_DEVICE void largest_of_row(const float* __restrict products, int64_t m, int64_t centers,
                                   float* __restrict cosines, uint8_t* __restrict which) {
  const int64_t count = Centers == 0 ? centers : Centers;
  for (int64_t first = 0; first < m; first += kCenterBlock) {
    const int64_t size = m - first < kCenterBlock ? m - first : kCenterBlock;
    const float* __restrict source = products + first * count;
    float best[kCenterBlock];
    int32_t at[kCenterBlock];
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) {
      float largest = source[j * count];
      int32_t center = 0;
      for (int64_t k = 1; k < count; ++k) {
        const float next = source[j * count + k];
        // The first of equal ones, and of NaN, which is larger than every number.
        const bool larger = (largest == largest) & !(next <= largest);
        largest = larger ? next : largest;
        center = larger ? static_cast<int32_t>(k) : center;
      }
      best[j] = largest;
      at[j] = center;
    }
    for (int64_t j = 0; j < size; ++j) cosines[first + j] = best[j];
    for (int64_t j = 0; j < size; ++j) which[first + j] = static_cast<uint8_t>(at[j]);
  }
}

template <int Centers>
void largest_of(const LargestOfCentersArgs& t, int threads) {
  parallel_rows(t.n, t.m * t.k, threads, [&](int64_t i) {
    largest_of_row<Centers>(t.products + i * t.m * t.k, t.m, t.k, t.cosines + i * t.m,
                            t.which + i * t.m);
  });
}

inline void largest_of_centers(const LargestOfCentersArgs& t, int threads) {
  switch (t.k) {
    case 2:
      return largest_of<2>(t, threads);
    case 3:
      return largest_of<3>(t, threads);
    case 4:
      return largest_of<4>(t, threads);
    default:
      return largest_of<0>(t, threads);
  }
}

// Elements are copied, whatever they are.
template <class Element>
void spread_over(const SpreadOverCentersArgs& t, int threads) {
  parallel_rows(t.n, t.m * t.k, threads, [&](int64_t i) {
    const Element* __restrict gradient = static_cast<const Element*>(t.gradient) + i * t.m;
    const uint8_t* __restrict which = t.which + i * t.m;
    Element* __restrict out = static_cast<Element*>(t.out) + i * t.m * t.k;
    for (int64_t j = 0; j < t.m * t.k; ++j) out[j] = 0;
    for (int64_t j = 0; j < t.m; ++j) out[j * t.k + which[j]] = gradient[j];
  });
}

inline void spread_over_centers(const SpreadOverCentersArgs& t, int threads) {
  if (t.dtype == DType::kFloat32) {
    spread_over<uint32_t>(t, threads);
  } else {
    spread_over<uint16_t>(t, threads);
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
