// GEMM of float32 matrices (AVX-512).
#include "cpu/gemm_avx512.h"

namespace unitsface::cpu {
namespace {

struct Float32 : Avx512 {
  using Type = float;
  static constexpr int64_t kPerWord = 1;
  // Depth of a block: 3 groups of b are 48 KB. Half of it would stay in L1, but the result would go
  // to memory and back once more, which costs more.
  static constexpr int64_t kWords = 256;

  static __m512i load(const float* line, int64_t count) {
    return _mm512_castps_si512(
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(count)), line));
  }

  static __m512 multiply_add(__m512 sum, __m512i left, __m512i right) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
  }

  static void pack_columns(const float* first, int64_t stride, int64_t rows, int64_t depth,
                           uint32_t* out, uint32_t* next) {
    for (int64_t k = 0; k < depth; ++k) {
      const float* line = first + k * stride;
      _mm512_store_si512(out + k * kGroup, load(line, rows));
      if (rows > kGroup) _mm512_store_si512(next + k * kGroup, load(line + kGroup, rows - kGroup));
    }
  }
};

}  // namespace

void gemm_f32(const GemmArgs* gemms, int64_t count, int threads) {
  multiply_matrices<Float32>(gemms, count, threads);
}

}  // namespace unitsface::cpu
