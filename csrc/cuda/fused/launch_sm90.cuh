// Launches of persistent kernels for sm_90a.
#pragma once

#include "mainloop_sm90.cuh"
#include "tensor_map.h"

namespace unitsface::cuda::sm90 {

// Most blocks of a launch: no device of compute capability 9.0 has more multiprocessors.
constexpr int kMostBlocks = 132;

// Tiles of block `block` of `blocks`.
UF_HOST_DEVICE Range range_of(const TileOrder& order, int block, int blocks) {
  const int64_t tiles = order.tiles();
  return {order.column_tiles, static_cast<int>(tiles * block / blocks),
          static_cast<int>(tiles * (block + 1) / blocks)};
}

// One per multiprocessor of the current device: a block takes all of its shared memory.
inline int blocks_of(const TileOrder& order) {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return static_cast<int>(min(order.tiles(), int64_t{min(count, kMostBlocks)}));
}

inline TensorMaps tensor_maps(const FusedOperands& operands, int64_t n, int64_t m,
                              const void* gradient, DType gradient_dtype, int64_t stride) {
  TensorMaps maps = {};
  maps.a = tensor_map(operands.a, operands.dtype, n, operands.depth, operands.a_stride, kTileRows,
                      kChunk);
  maps.b = tensor_map(operands.b, operands.dtype, m, operands.depth, operands.b_stride,
                      kTileColumns, kChunk);
  if (gradient != nullptr) {
    maps.gradient = tensor_map(gradient, gradient_dtype, n, m, stride, kSlabRows, kSlabColumns);
  }
  return maps;
}

template <class... Parameters, class... Arguments>
void launch_persistent(const char* name, void (*kernel)(Parameters...), int blocks, int bytes,
                       void* stream, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace unitsface::cuda::sm90
