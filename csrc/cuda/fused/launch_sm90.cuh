// Launches of persistent kernels for sm_90a.
#pragma once

#include "mainloop_sm90.cuh"
#include "tensor_map.h"
#include "tile_store_sm90.cuh"

namespace unitsface::cuda::sm90 {

// Most blocks of a launch: no device of compute capability 9.0 has more multiprocessors.
constexpr int kMostBlocks = 132;

// Blocks of a launch, and how many of them are a cluster.
struct Grid {
  int blocks, peers;
};

// Groups of `peers` row tiles times column tiles.
UF_HOST_DEVICE int64_t tiles_of_peers(const TileOrder& order, int peers) {
  return divide_up(order.row_tiles, peers) * order.column_tiles;
}

UF_HOST_DEVICE Range range_of(const TileOrder& order, int block, const Grid& grid) {
  const int64_t tiles = tiles_of_peers(order, grid.peers);
  const int cluster = block / grid.peers, clusters = grid.blocks / grid.peers;
  return {order.column_tiles, static_cast<int>(tiles * cluster / clusters),
          static_cast<int>(tiles * (cluster + 1) / clusters), grid.peers, block % grid.peers};
}

// Two blocks are a cluster where the second one seldom lacks rows: what sharing columns saves, a
// tenth of a tile's time by the model (bench/gpu_model/hopper.py), must exceed what an odd number
// of row tiles leaves idle.
inline int peers_of(const TileOrder& order) {
  constexpr int kLeastOdd = 9;
  return order.row_tiles % 2 == 0 || order.row_tiles >= kLeastOdd ? 2 : 1;
}

// One block per multiprocessor of the current device: it takes all of its shared memory.
inline Grid grid_of(const TileOrder& order) {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  count = min(count, kMostBlocks);
  const int peers = count >= 2 ? peers_of(order) : 1;
  const int64_t clusters = min(tiles_of_peers(order, peers), int64_t{count / peers});
  return {static_cast<int>(clusters) * peers, peers};
}

inline TensorMaps tensor_maps(const FusedOperands& operands, int64_t n, int64_t m,
                              const void* gradient, DType gradient_dtype, int64_t stride,
                              const Grid& grid) {
  TensorMaps maps = {};
  maps.a = tensor_map(operands.a, operands.dtype, n, operands.depth, operands.a_stride, kTileRows,
                      kChunk);
  maps.b = tensor_map(operands.b, operands.dtype, m, operands.depth, operands.b_stride,
                      kTileColumns / grid.peers, kChunk);
  if (gradient != nullptr) {
    maps.gradient = tensor_map(gradient, gradient_dtype, n, m, stride, kSlabRows, kSlabColumns);
  }
  return maps;
}

template <class... Parameters, class... Arguments>
void launch_persistent(const char* name, void (*kernel)(Parameters...), const Grid& grid, int bytes,
                       void* stream, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(grid.peers);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

}  // namespace unitsface::cuda::sm90
