// What the build and the machine offer.

#include <cuda_runtime.h>

#include "kernels.h"

namespace unitsface::cuda {

int device_count(std::string* reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  cudaGetLastError();  // Not sticky: the next call starts clean.
  if (reason != nullptr) {
    *reason = status == cudaSuccess ? "no CUDA device" : cudaGetErrorString(status);
  }
  return 0;
}

std::string compiled_archs() {
#if defined(UF_CUDA_ARCHS)
  return UF_CUDA_ARCHS;
#else
  std::string archs;
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    archs += (archs.empty() ? "" : ";") + std::to_string(arch / 10);
  }
  return archs;
#endif
}

}  // namespace unitsface::cuda
