// One kernel for every epilogue that serves a tile at a time, for sm_90a.
//
// An epilogue is a struct with
//
//   static constexpr int kBytes;    // of shared memory, for each consumer
//   void operator()(const Tile&, const ConsumerTeam&, Products&, unsigned char* memory) const;
//
// called by all threads of a consumer, which leaves the gradient, if any, in place of the cosines.
#pragma once

#include "kernels.h"
#include "launch_sm90.cuh"

namespace unitsface::cuda::sm90 {

using TileMemory = Memory<3, 1>;

// Gradients stay in registers until the whole tile is stored.
struct KeepSink {
  __device__ __forceinline__ void park(const Products&) const {}
  __device__ __forceinline__ void take(const Products&, int) const {}
  __device__ __forceinline__ void put(const Products&, int) const {}
};

// Of a launch, beside the epilogue and the tensor maps.
struct Launch {
  TileOrder order;
  Grid grid;
  int chunks;
  bool half, half_gradient, stores;
};

template <class Epilogue>
struct TileWork {
  const Epilogue& epilogue;
  const Launch& launch;
  const CUtensorMap* gradient;
  ConsumerTeam team;
  unsigned char *slabs, *memory;

  __device__ __forceinline__ void prepare(const Tile&) const {}
  __device__ __forceinline__ void operator()(const Tile& tile, Products& products) const {
    epilogue(tile, team, products, memory);
    if (launch.stores) {
      store_tile<TileMemory::kWarpSlabs>(gradient, slabs, tile, products, launch.half_gradient,
                                         team.row_warp());
    }
  }
};

template <class Epilogue>
__global__ void __launch_bounds__(kBlockThreads, 1)
    fused_tile_sm90_kernel(const Epilogue epilogue, const __grid_constant__ TensorMaps maps,
                           const Launch launch) {
  const TileMemory memory{dynamic_shared()};
  const Range range = range_of(launch.order, static_cast<int>(blockIdx.x), launch.grid);
  run_block(maps, memory, range, launch.chunks, [&](int consumer) {
    const ConsumerTeam team = team_of(consumer);
    TileWork<Epilogue> work = {epilogue,
                               launch,
                               &maps.gradient,
                               team,
                               memory.slabs(consumer * kWarpgroupWarps + team.row_warp()),
                               memory.end() + consumer * Epilogue::kBytes};
    consume(memory, range, launch.order, launch.chunks, launch.half, consumer, work);
    if (launch.stores) finish_stores();
  });
}

// `gradient`: null, or [n, m], stride.
template <class Epilogue>
void launch_tiles(const char* name, const Epilogue& epilogue, const FusedOperands& operands,
                  int64_t n, int64_t m, void* gradient, DType gradient_dtype, int64_t stride,
                  void* stream) {
  constexpr int kBytes = TileMemory::kBytes + kConsumers * Epilogue::kBytes;
  static_assert(TileMemory::kBytes % 16 == 0 && Epilogue::kBytes % 16 == 0, "alignment");
  static_assert(kBytes <= 232448, "227 KB");
  const TileOrder order(n, m);
  const Launch launch = {order,
                         grid_of(order),
                         static_cast<int>(divide_up(operands.depth, kChunk)),
                         operands.dtype == DType::kFloat16,
                         gradient_dtype == DType::kFloat16,
                         gradient != nullptr};
  launch_persistent(name, fused_tile_sm90_kernel<Epilogue>, launch.grid, kBytes, stream, epilogue,
                    tensor_maps(operands, n, m, gradient, gradient_dtype, stride, launch.grid),
                    launch);
}

}  // namespace unitsface::cuda::sm90
