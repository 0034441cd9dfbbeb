// Tensor maps by the driver's function, found at run time: the extension does not link libcuda.

#include "../common.cuh"
#include "kernels.h"
#include "tensor_map.h"

#if defined(UF_EMULATED)
#include "../emulation/tma.h"
#endif

namespace unitsface::cuda::sm90 {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#else
  check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it needs CUDA 12");
  }
  return reinterpret_cast<Encode>(function);
}

}  // namespace

bool mappable(const void* data, int64_t rows, int64_t columns, int64_t stride) {
  constexpr int64_t kMost = int64_t(1) << 31;
  return aligned(data, 16) && stride % 8 == 0 && rows > 0 && rows < kMost && columns > 0 &&
         columns < kMost && stride < (int64_t(1) << 38);
}

bool supports(const FusedOperands& operands, int64_t n, int64_t m, const void* gradient,
              DType gradient_dtype, int64_t stride) {
  if (n == 0 || m == 0) return true;
  const bool stored = gradient == nullptr ||
                      (gradient_dtype != DType::kFloat32 && mappable(gradient, n, m, stride));
  return operands.dtype != DType::kFloat32 && stored &&
         mappable(operands.a, n, operands.depth, operands.a_stride) &&
         mappable(operands.b, m, operands.depth, operands.b_stride);
}

CUtensorMap tensor_map(const void* data, DType dtype, int64_t rows, int64_t columns, int64_t stride,
                       int box_rows, int box_columns) {
  static const Encode encode = find_encode();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult status = encode(
      &map,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace unitsface::cuda::sm90
