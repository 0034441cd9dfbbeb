// Where the cosines of a tile lie in registers, and what sums over them.
//
// A warp owns strips of 16 rows. Of each, lane l has rows l / 4 and l / 4 + 8, and of every 8
// columns 2 (l % 4) and the next: the C fragment of mma.m16n8 and, per warp, the D fragment of
// wgmma (PTX ISA, Matrix Fragments for mma.m16n8k16; Register Fragments for wgmma). The float32
// kernels without tensor cores use the same.
#pragma once

#include "../common.cuh"
#include "ptx.cuh"
#include "scheduler.h"

namespace unitsface::cuda {

template <int kRows, int kColumns>
struct Accumulator {
  static constexpr int kRowTiles = kRows, kColumnTiles = kColumns;

  float value[kRowTiles][kColumnTiles][4];  // of the lane: [2 * half + which]
};

// The threads that compute a tile: kRowWarps x kColumnWarps warps, each with kRowTiles strips of 16
// rows, kRowStep apart, and kColumnTiles columns of 8. `Barrier` lets all of them wait for each
// other, `thread` counts them.
template <int kRowTiles_, int kColumnTiles_, int kRowWarps_, int kColumnWarps_, int kRowStep,
          class Barrier>
struct Team {
  static constexpr int kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_;
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_;
  static constexpr int kThreads = kLanes * kRowWarps * kColumnWarps;
  static_assert(16 * kRowTiles * kRowWarps == kTileRows, "the rows of a tile");
  static_assert(8 * kColumnTiles * kColumnWarps == kTileColumns, "the columns of a tile");
  using Values = Accumulator<kRowTiles, kColumnTiles>;

  int thread;
  Barrier barrier;

  __device__ __forceinline__ int lane() const { return thread % kLanes; }
  __device__ __forceinline__ int row_warp() const { return thread / kLanes / kColumnWarps; }
  __device__ __forceinline__ int column_warp() const { return thread / kLanes % kColumnWarps; }
  __device__ __forceinline__ int first_row() const {
    return row_warp() * (kRowStep == 16 ? 16 * kRowTiles : 16);
  }
  __device__ __forceinline__ int first_column() const { return column_warp() * 8 * kColumnTiles; }
  // Of the tile.
  __device__ __forceinline__ int row(int row_tile, int half) const {
    return first_row() + kRowStep * row_tile + 8 * half + lane() / 4;
  }
  __device__ __forceinline__ int column(int column_tile, int which) const {
    return first_column() + 8 * column_tile + 2 * (lane() % 4) + which;
  }
  // Whether some of a strip's rows, or of 8 columns, are inside the tile; the same for all lanes of
  // a warp.
  __device__ __forceinline__ bool has_strip(int row_tile, const Tile& tile) const {
    return first_row() + kRowStep * row_tile < tile.rows;
  }
  __device__ __forceinline__ bool has_columns(int column_tile, const Tile& tile) const {
    return first_column() + 8 * column_tile < tile.columns;
  }
  // A bit for each row of the lane that is `row`, in the order of 2 * row_tile + half.
  __device__ __forceinline__ uint32_t bit_of_row(int row) const {
    const unsigned distance = static_cast<unsigned>(row - this->row(0, 0));
    const unsigned place = distance / kRowStep * 2 + distance % kRowStep / 8;
    const bool own = distance % 8 == 0 && distance % kRowStep < 16 && place < 2 * kRowTiles;
    return own ? 1u << place : 0u;
  }
  __device__ __forceinline__ void wait() const { barrier(); }
};

// All threads of the block.
struct BlockBarrier {
  __device__ __forceinline__ void operator()() const { __syncthreads(); }
};

// Adds over the lanes that share a row; all of them get the sum.
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Adds over the lanes that share a column.
__device__ __forceinline__ float sum_of_column(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 4);
  x += __shfl_xor_sync(kAllLanes, x, 8);
  return x + __shfl_xor_sync(kAllLanes, x, 16);
}

// Of a tile that starts at `row` and `column`: the pair (row + r, column + c) is left out if
// r + shift == c.
__device__ __forceinline__ int diagonal_shift(const Tile& tile, int64_t diagonal) {
  // Unsigned: INT64_MIN wraps to far outside the tile.
  const int64_t shift =
      static_cast<int64_t>(static_cast<uint64_t>(tile.row()) + static_cast<uint64_t>(diagonal) -
                           static_cast<uint64_t>(tile.column()));
  return shift > -kTileRows && shift < kTileColumns ? static_cast<int>(shift) : 4 * kTileColumns;
}

}  // namespace unitsface::cuda
