// What an extension of the emulated kernels lacks: the CUDA library, a device, and CPU kernels.
// python_tests/support/emulation.py links it with csrc/module.cpp, csrc/arguments.cpp and the .cu
// files, so that Python launches emulated kernels as it launches those of a device.
#include <cuda_runtime.h>

#include <stdexcept>

#include "async_copies.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return ""; }
const char* cudaGetErrorString(cudaError_t) { return ""; }

// For tests, beside the module's functions: EMULATION_SEED while the process runs, and how many of
// the launches were of kernels for sm_90a, which alone have dynamic shared memory.
__attribute__((visibility("default"))) void emulation_seed(uint64_t seed) {
  emulation::choose_order(seed);
}
__attribute__((visibility("default"))) int64_t emulation_hopper_launches() {
  return emulation::dynamic_launches;
}
}

namespace unitsface {

namespace cuda {

int device_count(std::string*) { return 1; }
std::string image_failure() { return ""; }
std::string compiled_archs() { return ""; }

}  // namespace cuda

namespace cpu {

namespace {

[[noreturn]] void absent() { throw std::logic_error("the emulation has no CPU kernels"); }

}  // namespace

const Kernels& kernels() { absent(); }
const LossKernels* kernels_of(const std::string&) { absent(); }
void register_loss(const std::string&, const LossKernels*) { absent(); }
void run_chunks(int64_t, int, RunChunk, const void*) { absent(); }
bool has_gemm(DType) { absent(); }
bool multiply(const GemmArgs*, size_t, int) { absent(); }
std::vector<std::string> compiled_isas() { absent(); }
std::vector<std::string> usable_isas() { absent(); }

}  // namespace cpu

}  // namespace unitsface
