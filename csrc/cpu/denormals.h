// Denormal numbers are zeros while the kernels of a loss run.
#pragma once

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#define UF_FLUSHES_DENORMALS
#endif

namespace unitsface::cpu {
inline namespace UF_ISA {

// Terms of pairs far from the threshold, as a trained model has them, are denormal, or intermediate
// results of their logarithm are: x86 processors take a hundred cycles for an instruction with such
// a result. The threads of a loop take the mode over from the calling one.
class FlushDenormals {
#if defined(UF_FLUSHES_DENORMALS)
 public:
  FlushDenormals() : former_(_mm_getcsr()) { _mm_setcsr(former_ | kFlushResults | kFlushOperands); }
  ~FlushDenormals() { _mm_setcsr(former_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  static constexpr unsigned kFlushResults = 0x8000, kFlushOperands = 0x0040;
  unsigned former_;
#endif
};

}  // namespace UF_ISA
}  // namespace unitsface::cpu
