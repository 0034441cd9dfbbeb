// Loops over a row's columns with sums that stay in a vector register.
#pragma once

#include <cstdint>

#include "unitsface/macros.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// Floats of a vector.
#if defined(__AVX512F__)
constexpr int32_t kLanes = 16;
#elif defined(__AVX__)
constexpr int32_t kLanes = 8;
#else
constexpr int32_t kLanes = 4;
#endif

// body(column, lane) for the columns [first, stop). Compilers vectorize it with structs and lambdas
// inside a body, which they do not inside a loop.
template <class Body>
UF_HOST_DEVICE void each_lane(int32_t first, int32_t stop, const Body& body) {
  int32_t j = first;
  // A constant number of lanes: the compiler keeps the sums in registers.
  for (; j + kLanes <= stop; j += kLanes) {
#pragma omp simd
    for (int32_t lane = 0; lane < kLanes; ++lane) body(j + lane, lane);
  }
#pragma omp simd
  for (int32_t lane = 0; lane < stop - j; ++lane) body(j + lane, lane);
}

inline float sum_of(const float* values, int32_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int32_t k = 0; k < count; ++k) sum += values[k];
  return sum;
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
