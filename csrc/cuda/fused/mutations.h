// Planted faults: places where the emulation breaks a kernel on purpose, so that a test can show
// that it notices (python_tests/kernels/test_fused_mutations.py has the list).
#pragma once

#include "unitsface/macros.h"

namespace unitsface::cuda {

#if defined(UF_EMULATED) && defined(UF_MUTATION)
UF_HOST_DEVICE constexpr bool mutated(int fault) { return fault == UF_MUTATION; }
#else
UF_HOST_DEVICE constexpr bool mutated(int) { return false; }
#endif

}  // namespace unitsface::cuda
