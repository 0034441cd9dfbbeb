// Operands of GEMMs of bfloat16 matrices, packed with AVX-512: a word is two elements along the
// depth.
#pragma once

#include "cpu/gemm_avx512.h"

namespace unitsface::cpu {
namespace {

struct PackedBFloat16 : Avx512 {
  using Type = uint16_t;
  static constexpr int64_t kPerWord = 2;

  static __m512i load(const uint16_t* line, int64_t count) {
    return _mm512_maskz_loadu_epi16(first_lanes(count), line);
  }

  static void pack_columns(const uint16_t* first, int64_t stride, int64_t rows, int64_t depth,
                           uint32_t* out, uint32_t* next) {
    for (int64_t k = 0; k < depth; k += 2) {
      const uint16_t* line = first + k * stride;
      const __m512i even = load(line, rows);
      const __m512i odd = k + 1 < depth ? load(line + stride, rows) : _mm512_setzero_si512();
      const auto words = [&](int half) {
        const __m256i low =
            half == 0 ? _mm512_castsi512_si256(even) : _mm512_extracti64x4_epi64(even, 1);
        const __m256i high =
            half == 0 ? _mm512_castsi512_si256(odd) : _mm512_extracti64x4_epi64(odd, 1);
        return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      };
      _mm512_store_si512(out + k / 2 * kGroup, words(0));
      if (rows > kGroup) _mm512_store_si512(next + k / 2 * kGroup, words(1));
    }
  }
};

}  // namespace
}  // namespace unitsface::cpu
