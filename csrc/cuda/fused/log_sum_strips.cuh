// Statistics of the rows of a tile, from the lanes that share a row to the partials of the tile.
#pragma once

#include "../partials.h"
#include "accumulator.cuh"

namespace unitsface::cuda {

// One statistic per row (or column) and warp.
struct StripStatistics {
  static constexpr int kMostWarps = 4;

  Statistic of[kMostWarps][kTileRows];

  __device__ __forceinline__ void put(int warp, int place, Statistic value) {
    shared_store(&of[warp][place], value);
  }

  // Folds `count` warps in their order, for the `inside` first of the tile's rows.
  template <class Fold, class Team>
  __device__ __forceinline__ void write(const Partials& partials, int block, int64_t first,
                                        int inside, int count, const Team& team) const {
    for (int place = team.thread; place < inside; place += Team::kThreads) {
      Statistic result = Fold::none();
#pragma unroll
      for (int warp = 0; warp < kMostWarps; ++warp) {
        if (warp < count) result = Fold::fold(result, shared_load(&of[warp][place]));
      }
      partials.write(block, first + place, result);
    }
  }
};
static_assert(kTileRows == kTileColumns, "statistics of both");

// Maxima over the lanes that share a row, or a column. fmaxf drops NaN, which sums carry.
__device__ __forceinline__ float maximum_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float maximum_of_column(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 4));
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 8));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 16));
}

// The first and, summed over the lanes that share a row, the second numbers of a lane's rows.
template <class Team>
__device__ __forceinline__ void put_rows(StripStatistics& shared, const Team& team,
                                         const float* firsts, const float* seconds) {
#pragma unroll
  for (int r = 0; r < 2 * Team::kRowTiles; ++r) {
    const float second = sum_of_row(seconds[r]);
    if (team.lane() % 4 == 0) {
      shared.put(team.column_warp(), team.row(r / 2, r % 2), {firsts[r], second});
    }
  }
}

}  // namespace unitsface::cuda
