// Devices of the machine and architectures of the build.

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

namespace {

__global__ void probe_kernel() {}

}  // namespace

std::string image_failure() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // Not sticky: the next call starts clean.
  switch (status) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorInsufficientDriver:
      return cudaGetErrorString(status);
    default:
      return "";  // Unrelated to the image, for instance a lack of memory.
  }
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
