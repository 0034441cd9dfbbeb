// GEMM of bfloat16 matrices (AVX512-BF16).
//
// The libraries shipped with Torch round such a matmul's result to bfloat16, a larger error than
// the rounding of the operands. vdpbf16ps adds two bfloat16 multiplications to each float32 lane:
// a word is two elements along the depth.
//
// Nothing inline of another header is used here: the linker could keep this set's copy of it.
#include "cpu/gemm_avx512.h"

namespace unitsface::cpu {
namespace {

struct BFloat16 : Avx512 {
  using Type = uint16_t;
  static constexpr int64_t kPerWord = 2;
  static constexpr int64_t kWords = 128;  // of the depth at a time: 3 groups of b are 24 KB, in L1

  static __m512i load(const uint16_t* line, int64_t count) {
    return _mm512_maskz_loadu_epi16(first_lanes(count), line);
  }

  static __m512 multiply_add(__m512 sum, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
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

void gemm_bf16(const GemmArgs* gemms, int64_t count, int threads) {
  multiply_matrices<BFloat16>(gemms, count, threads);
}

}  // namespace unitsface::cpu
