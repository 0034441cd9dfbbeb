// GEMM of float32 matrices (AVX2 and FMA).
#include "cpu/gemm.h"

namespace unitsface::cpu {
namespace {

struct Float32 : Defaults {
  using Type = float;
  using Words = __m256i;
  using Sums = __m256;
  static constexpr int64_t kPerWord = 1;
  static constexpr int64_t kGroup = 8;
  static constexpr int kTileRows = 4;     // 4 x 3 vectors of sums
  static constexpr int64_t kWords = 256;  // of the depth at a time: 3 groups of b are 24 KB, in L1

  static __m256i first_lanes(int64_t count) {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(smaller(count, kGroup))), places);
  }

  static Words zero() { return _mm256_setzero_si256(); }

  static Words words(const uint32_t* packed) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(packed));
  }

  static void store(uint32_t* packed, Words v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(packed), v);
  }

  static Words broadcast(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }

  static Words load(const float* line, int64_t count) {
    if (count >= kGroup) return _mm256_castps_si256(_mm256_loadu_ps(line));
    return _mm256_castps_si256(_mm256_maskload_ps(line, first_lanes(count)));
  }

  static Sums multiply_add(Sums sum, Words left, Words right) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(left), _mm256_castsi256_ps(right), sum);
  }

  // The first `count` elements.
  static void write(float* out, Sums value, int64_t count, bool add) {
    if (count >= kGroup) {
      if (add) value = _mm256_add_ps(value, _mm256_loadu_ps(out));
      _mm256_storeu_ps(out, value);
    } else if (count > 0) {
      const __m256i lanes = first_lanes(count);
      if (add) value = _mm256_add_ps(value, _mm256_maskload_ps(out, lanes));
      _mm256_maskstore_ps(out, lanes, value);
    }
  }

  // Words of 8 rows -> 8 rows of words, in place.
  static void transpose(__m256i* v) {
    __m256i t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {  // within 128 bits: pairs of rows, then of pairs
      t[i] = i % 2 == 0 ? _mm256_unpacklo_epi32(v[i], v[i + 1])
                        : _mm256_unpackhi_epi32(v[i - 1], v[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const int even = i / 4 * 4 + i % 4 / 2;
      v[i] = i % 2 == 0 ? _mm256_unpacklo_epi64(t[even], t[even + 2])
                        : _mm256_unpackhi_epi64(t[even], t[even + 2]);
    }
    // v[4 r + c], 128 bits q: words 4 q + c of rows 4 r ... 4 r + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      t[c] = _mm256_permute2x128_si256(v[c], v[c + 4], 0x20);
      t[c + 4] = _mm256_permute2x128_si256(v[c], v[c + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) v[c] = t[c];
  }

  static void pack_columns(const float* first, int64_t stride, int64_t rows, int64_t depth,
                           uint32_t* out, uint32_t* next) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* line = first + k * stride;
      store(out + k * kGroup, load(line, rows));
      if (rows > kGroup) store(next + k * kGroup, load(line + kGroup, rows - kGroup));
    }
  }
};

}  // namespace

void gemm_f32_avx2(const GemmArgs* gemms, int64_t count, int threads) {
  multiply_matrices<Float32>(gemms, count, threads);
}

}  // namespace unitsface::cpu
