// Planted faults: places where the emulation breaks a kernel on purpose, so that a test can show
// that it finds. python_tests/kernels/test_fused_mutations.py and
// test_fused_mutations_sm90.py have the lists.
#pragma once

#include <cstdlib>

#include "unitsface/macros.h"

namespace unitsface::cuda {

// Chosen when the program runs, by EMULATION_FAULT.
#if defined(UF_EMULATED)
inline bool planted(int fault) {
  static const char* chosen = std::getenv("EMULATION_FAULT");
  return chosen != nullptr && std::atoi(chosen) == fault;
}
#else
UF_HOST_DEVICE constexpr bool planted(int) { return false; }
#endif

}  // namespace unitsface::cuda
