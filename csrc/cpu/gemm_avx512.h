// Vectors of the GEMMs with AVX-512.
#pragma once

#include "cpu/gemm.h"

namespace unitsface::cpu {
namespace {

inline __mmask32 first_lanes(int64_t count) {
  if (count >= 32) return ~__mmask32{0};
  return count <= 0 ? 0 : (__mmask32{1} << count) - 1;
}

struct Avx512 : Defaults {
  using Words = __m512i;
  using Sums = __m512;
  static constexpr int64_t kGroup = 16;
  static constexpr int kTileRows = 8;  // 8 x 3 vectors of sums

  static Words zero() { return _mm512_setzero_si512(); }
  static Words words(const uint32_t* packed) { return _mm512_load_si512(packed); }
  static void store(uint32_t* packed, Words v) { _mm512_store_si512(packed, v); }
  static Words broadcast(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }

  // The first `count` elements.
  static void write(float* out, Sums value, int64_t count, bool add) {
    const auto lanes = static_cast<__mmask16>(first_lanes(count));
    if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, out));
    _mm512_mask_storeu_ps(out, lanes, value);
  }

  // Words of 16 rows -> 16 rows of words, in place.
  static void transpose(__m512i* v) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {  // within 128 bits: pairs of rows, then of pairs
      t[i] = i % 2 == 0 ? _mm512_unpacklo_epi32(v[i], v[i + 1])
                        : _mm512_unpackhi_epi32(v[i - 1], v[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const int even = i / 4 * 4 + i % 4 / 2;
      v[i] = i % 2 == 0 ? _mm512_unpacklo_epi64(t[even], t[even + 2])
                        : _mm512_unpackhi_epi64(t[even], t[even + 2]);
    }
    // v[4 r + c], 128 bits q: words 4 q + c of rows 4 r ... 4 r + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      t[c] = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x88);
      t[c + 4] = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xdd);
      t[c + 8] = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x88);
      t[c + 12] = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      v[c] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0x88);
      v[c + 8] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0xdd);
      v[c + 4] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0x88);
      v[c + 12] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0xdd);
    }
  }
};

}  // namespace
}  // namespace unitsface::cpu
