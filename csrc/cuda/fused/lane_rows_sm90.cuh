// Pairs of samples where a thread has the cosines of 4 rows and 32 columns: labels are compared
// when a pair's turn comes, since masks of all pairs would take as many registers as are left.
#pragma once

#include "accumulator.cuh"

namespace unitsface::cuda {

// Columns after which a branch keeps the compiler from working on all of them at a time, which
// would take more registers than there are.
constexpr int kStripTiles = 2;

// Labels of the tile's columns in shared memory, of what is outside -1.
template <class Team>
__device__ __forceinline__ void stage_labels(int64_t* labels, const int64_t* b_labels,
                                             const Tile& tile, const Team& team) {
  for (int place = team.thread; place < kTileColumns; place += Team::kThreads) {
    const bool inside = place < tile.columns;
    shared_store(&labels[place], inside ? __ldg(b_labels + tile.column() + place) : int64_t{-1});
  }
}

// A lane's rows.
template <class Team>
struct LaneRows {
  static constexpr int kCount = 2 * Team::kRowTiles;

  int64_t labels[kCount];  // of what is outside -1
  int left_out[kCount];    // column of the pair on the diagonal, counted from the lane's first

  __device__ __forceinline__ LaneRows(const int64_t* a_labels, int64_t diagonal, const Tile& tile,
                                      const Team& team) {
    const int shift = diagonal_shift(tile, diagonal);
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const int row = team.row(r / 2, r % 2);
      labels[r] = row < tile.rows ? __ldg(a_labels + tile.row() + row) : -1;
      left_out[r] = row + shift - team.column(0, 0);
    }
  }

  // `label`: that of the column.
  __device__ __forceinline__ bool counts(int r, int column_tile, int which, int64_t label) const {
    return label >= 0 && labels[r] >= 0 && left_out[r] != 8 * column_tile + which;
  }
};

template <class Values>
__device__ __forceinline__ auto& value_of(Values& values, int r, int column_tile, int which) {
  return values.value[r / 2][column_tile][2 * (r % 2) + which];
}

}  // namespace unitsface::cuda
