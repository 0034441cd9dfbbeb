// GEMM of bfloat16 matrices (AVX512-BF16; gemm_amx.cpp where there is AMX).
//
// The libraries shipped with Torch round such a matmul's result to bfloat16, a larger error than
// the rounding of the operands. vdpbf16ps adds two bfloat16 multiplications to each float32 lane.
//
// Nothing inline of another header is used here: the linker could keep this set's copy of it.
#include "cpu/gemm_bf16.h"

namespace unitsface::cpu {
namespace {

struct BFloat16 : PackedBFloat16 {
  static constexpr int64_t kWords = 128;  // of the depth at a time: 3 groups of b are 24 KB, in L1

  static __m512 multiply_add(__m512 sum, __m512i left, __m512i right) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};

}  // namespace

void gemm_bf16(const GemmArgs* gemms, int64_t count, int threads) {
  multiply_matrices<BFloat16>(gemms, count, threads);
}

}  // namespace unitsface::cpu
