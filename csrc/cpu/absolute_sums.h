// Sums of the absolute values of a gradient tile, by which gradient filtering decides.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "cpu/elements.h"
#include "cpu/pool.h"
#include "unitsface/tile_args.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

UF_HOST_DEVICE float magnitude(float x) { return fabsf(x); }

UF_HOST_DEVICE float magnitude(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fffu) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Element>
void absolute_sums_of(const AbsoluteSumsArgs& t, int threads) {
  const Element* tile = static_cast<const Element*>(t.tile);
  if (!t.by_column) {
    parallel_rows(t.n, t.m, threads, [&](int64_t i) {
      const Element* __restrict row = tile + i * t.m;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < t.m; ++j) sum += magnitude(row[j]);
      t.sums[i] = sum;
    });
    return;
  }
  constexpr int64_t kColumns = 64;
  parallel_chunks((t.m + kColumns - 1) / kColumns, threads, [&](int64_t chunk, int) {
    const int64_t first = chunk * kColumns;
    const int64_t count = t.m - first < kColumns ? t.m - first : kColumns;
    float* __restrict sums = t.sums + first;
    for (int64_t j = 0; j < count; ++j) sums[j] = 0.0f;
    for (int64_t i = 0; i < t.n; ++i) {
      const Element* __restrict row = tile + i * t.m + first;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) sums[j] += magnitude(row[j]);
    }
  });
}

inline void absolute_sums(const AbsoluteSumsArgs& t, int threads) {
  if (t.dtype == DType::kBFloat16) {
    absolute_sums_of<BFloat16>(t, threads);
  } else {
    absolute_sums_of<float>(t, threads);
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
