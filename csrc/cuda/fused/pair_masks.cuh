// Which pairs of a lane are positive, and which count: labels are compared before the policies run,
// so that these keep no labels in registers.
#pragma once

#include "accumulator.cuh"

namespace unitsface::cuda {

// Labels of a tile in shared memory, of what is outside -1.
struct TileLabels {
  int64_t a[kTileRows], b[kTileColumns];

  template <class Team>
  __device__ __forceinline__ void stage(const int64_t* a_labels, const int64_t* b_labels,
                                        const Tile& tile, const Team& team) {
    for (int row = team.thread; row < kTileRows; row += Team::kThreads) {
      shared_store(&a[row], row < tile.rows ? __ldg(a_labels + tile.row() + row) : int64_t{-1});
    }
    for (int column = team.thread; column < kTileColumns; column += Team::kThreads) {
      const bool inside = column < tile.columns;
      shared_store(&b[column], inside ? __ldg(b_labels + tile.column() + column) : int64_t{-1});
    }
  }
};

// Bit (2 column_tile + which) * kRows + 2 * row_tile + half, from the lowest of the first word on.
template <class Team>
struct PairMasks {
  static constexpr int kRows = 2 * Team::kRowTiles;
  static constexpr int kColumns = 2 * Team::kColumnTiles;
  static constexpr int kWords = (kRows * kColumns + 31) / 32;
  static_assert(32 % kRows == 0, "the rows of a column are in one word");

  uint32_t same[kWords], counted[kWords];

  __device__ __forceinline__ bool is_same(int column, int row) const {
    const int bit = column * kRows + row;
    return (same[bit / 32] >> bit % 32 & 1) != 0;
  }
  __device__ __forceinline__ bool counts(int column, int row) const {
    const int bit = column * kRows + row;
    return (counted[bit / 32] >> bit % 32 & 1) != 0;
  }

  __device__ __forceinline__ PairMasks(const TileLabels& all, int64_t diagonal, const Tile& tile,
                                       const Team& team) {
    int64_t labels[kRows];
    uint32_t rows = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      labels[r] = shared_load(&all.a[team.row(r / 2, r % 2)]);
      rows |= labels[r] >= 0 ? 1u << r : 0u;
    }
    const int shift = diagonal_shift(tile, diagonal);
#pragma unroll
    for (int word = 0; word < kWords; ++word) same[word] = counted[word] = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = team.column(c / 2, c % 2);
      const int64_t label = shared_load(&all.b[column]);
      const int first = c * kRows % 32;
      uint32_t& same_word = same[c * kRows / 32];
#pragma unroll
      for (int r = 0; r < kRows; ++r) same_word |= labels[r] == label ? 1u << (first + r) : 0u;
      uint32_t inside = label >= 0 ? rows : 0u;
      if (!planted(55)) inside &= ~team.bit_of_row(column - shift);
      counted[c * kRows / 32] |= inside << first;
    }
    // Else the compiler keeps what each bit was made of, which takes more registers.
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      same[word] = computed_again(same[word]);
      counted[word] = computed_again(counted[word]);
    }
  }
};

}  // namespace unitsface::cuda
