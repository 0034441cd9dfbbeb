// Element types that the CPU kernels write; computation is in float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "unitsface/macros.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

struct BFloat16 {
  uint16_t bits;
};

template <class T>
T round_to(float x);

template <>
UF_HOST_DEVICE float round_to<float>(float x) {
  return x;
}

// Rounds to nearest, ties to even, in integer arithmetic, which every instruction set vectorizes.
template <>
UF_HOST_DEVICE BFloat16 round_to<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  // Rounding could overflow a NaN's mantissa and make it a zero.
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

// Not inlined: all policies share it.
UF_SHARED inline void round_row(const float* __restrict row, BFloat16* __restrict out, int64_t m) {
#pragma omp simd
  for (int64_t j = 0; j < m; ++j) out[j] = round_to<BFloat16>(row[j]);
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
