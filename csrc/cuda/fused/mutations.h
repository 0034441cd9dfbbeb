// Planted faults: places where the emulation breaks a kernel on purpose, so that a test can show
// that it notices (python_tests/kernels/test_fused_mutations.py has the list).
#pragma once

#include <cstdlib>

#include "unitsface/macros.h"

namespace unitsface::cuda {

#if defined(UF_EMULATED) && defined(UF_MUTATION)
UF_HOST_DEVICE constexpr bool mutated(int fault) { return fault == UF_MUTATION; }
#else
UF_HOST_DEVICE constexpr bool mutated(int) { return false; }
#endif

// The same, chosen when the program runs, by EMULATION_FAULT; faults of the kernels for sm_90a
// (test_fused_mutations_sm90.py).
#if defined(UF_EMULATED)
inline bool planted(int fault) {
  static const char* chosen = std::getenv("EMULATION_FAULT");
  return chosen != nullptr && std::atoi(chosen) == fault;
}
#else
UF_HOST_DEVICE constexpr bool planted(int) { return false; }
#endif

}  // namespace unitsface::cuda
