// Tiles of gradients from registers to memory, for sm_90a.
#pragma once

#include "mainloop_sm90.cuh"

namespace unitsface::cuda::sm90 {

__device__ __forceinline__ uint32_t pack(bool half, float low, float high) {
  uint32_t word;
  if (half) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// A tile of 16-bit numbers through the warp's slabs: what is outside is not written.
template <int kWarpSlabs>
__device__ __forceinline__ void store_tile(const CUtensorMap* map, unsigned char* slabs,
                                           const Tile& tile, const Products& values, bool half,
                                           int warp) {
  const int lane = threadIdx.x % kLanes;
  // Lane l names row l % 8 of matrix l / 8: rows + 0, rows + 8, and the same of the next 8 columns.
  const int row = lane % 16, next = lane / 16;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int rows = part / 2, columns = part % 2;
    unsigned char* slab = slabs + part % kWarpSlabs * kSlabBytes;
    if (lane == 0 && !planted(20)) tma_store_wait_read<kWarpSlabs - 1>();
    if (!planted(21)) warp_sync();
#pragma unroll
    for (int j = 0; j < kSlabColumns / 16; ++j) {
      const float (&left)[4] = values.value[rows][8 * columns + 2 * j];
      const float (&right)[4] = values.value[rows][8 * columns + 2 * j + 1];
      const uint32_t words[4] = {pack(half, left[0], left[1]), pack(half, left[2], left[3]),
                                 pack(half, right[0], right[1]), pack(half, right[2], right[3])};
      const int piece = 2 * j + next;
      store_matrices(slab + row * 128 + (planted(22) ? piece : piece ^ row % 8) * 16, words);
    }
    if (!planted(23)) fence_proxy_async();
    if (!planted(24)) warp_sync();
    if (lane == 0) {
      tma_store(slab, map, static_cast<int>(tile.column()) + kSlabColumns * columns,
                static_cast<int>(tile.row()) + 64 * rows + kSlabRows * warp);
      tma_store_commit();
    }
  }
}

// Before a warp's slabs end.
__device__ __forceinline__ void finish_stores() {
  if (threadIdx.x % kLanes == 0 && !planted(25)) tma_store_wait_read<0>();
}

}  // namespace unitsface::cuda::sm90
