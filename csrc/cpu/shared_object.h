// A loss as a shared object of its own, compiled at run time by
// unitsface_kernels/backends/native/custom: its source defines a policy, includes this, and names
// it in one UF_EXPORT. Loops run on the threads of the extension.
#pragma once

#include "cpu/policy_kernels.h"

namespace unitsface::cpu {
namespace {

RunChunks pool_of_extension = nullptr;

}  // namespace

void run_chunks(int64_t count, int threads, RunChunk run, const void* body) {
  pool_of_extension(count, threads, run, body);
}

}  // namespace unitsface::cpu

// `kernels`: a function of policy_kernels.h.
#define UF_EXPORT(kernels, Policy)                                                          \
  extern "C" {                                                                              \
  __attribute__((visibility("default"))) int64_t unitsface_abi() {                          \
    return unitsface::cpu::loss_abi();                                                      \
  }                                                                                         \
  __attribute__((visibility("default"))) const unitsface::cpu::LossKernels* unitsface_loss( \
      unitsface::cpu::RunChunks pool) {                                                     \
    static constexpr unitsface::cpu::LossKernels found =                                    \
        unitsface::cpu::kernels<unitsface::Policy>();                                       \
    unitsface::cpu::pool_of_extension = pool;                                               \
    return &found;                                                                          \
  }                                                                                         \
  }
