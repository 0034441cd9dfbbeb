// A tile of gradients from registers to memory.
#pragma once

#include "accumulator.cuh"

namespace unitsface::cuda {

// [n, m], stride, of which a tile is stored.
struct GradientTile {
  void* data;
  DType dtype;
  int64_t stride;
  bool wide;  // rows of a tile start at multiples of 16 bytes

  GradientTile(void* gradient, DType type, int64_t row_stride)
      : data(gradient),
        dtype(type),
        stride(row_stride),
        wide(aligned(gradient, 16) && row_stride * size_of(type) % 16 == 0) {}
};

// Two neighbors of a row, of which the second may be outside.
template <class T>
__device__ __forceinline__ void store_two(T* target, float first, float second, bool wide,
                                          int columns) {
  if (wide && columns > 1) {
    T items[2] = {round_to<T>(first), round_to<T>(second)};
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float2*>(target) = make_float2(first, second);
    } else {
      uint32_t word;
      memcpy(&word, items, 4);
      *reinterpret_cast<uint32_t*>(target) = word;
    }
    return;
  }
  if (columns > 0) target[0] = round_to<T>(first);
  if (columns > 1) target[1] = round_to<T>(second);
}

template <class T, class Team>
__device__ __forceinline__ void store_direct(const GradientTile& target, const Tile& tile,
                                             const Team& team,
                                             const typename Team::Values& values) {
  const int first = team.column(0, 0);
  const int columns = tile.columns - first;
#pragma unroll
  for (int r = 0; r < 2 * Team::kRowTiles; ++r) {
    const int row = team.row(r / 2, r % 2);
    if (row >= tile.rows) continue;
    T* start =
        static_cast<T*>(target.data) + (tile.row + row) * target.stride + tile.column + first;
#pragma unroll
    for (int c = 0; c < Team::kColumnTiles; ++c) {
      const float* pair = values.value[r / 2][c] + 2 * (r % 2);
      store_two(start + 8 * c, pair[0], pair[1], target.wide, columns - 8 * c);
    }
  }
}

// Rows of 16-bit numbers pass through shared memory, `memory` of 32 KB, so that each is stored in
// whole sectors.
template <class T, class Team>
__device__ __forceinline__ void store_through(const GradientTile& target, const Tile& tile,
                                              const Team& team, const typename Team::Values& values,
                                              unsigned char* memory) {
  constexpr int kRowBytes = kTileColumns * 2, kChunks = kRowBytes / 16;
  team.wait();
#pragma unroll
  for (int r = 0; r < 2 * Team::kRowTiles; ++r) {
    const int row = team.row(r / 2, r % 2);
#pragma unroll
    for (int c = 0; c < Team::kColumnTiles; ++c) {
      const float* pair = values.value[r / 2][c] + 2 * (r % 2);
      T items[2] = {round_to<T>(pair[0]), round_to<T>(pair[1])};
      uint32_t word;
      memcpy(&word, items, 4);
      // Eight rows of a warp are in different banks.
      const int column = team.column(c, 0);
      const int chunk = column / 8 ^ row % 8;
      shared_store(
          reinterpret_cast<uint32_t*>(memory + row * kRowBytes + chunk * 16) + column % 8 / 2,
          word);
    }
  }
  if (!mutated(11)) team.wait();
#pragma unroll 2
  for (int k = team.thread; k < kTileRows * kChunks; k += Team::kThreads) {
    const int row = k / kChunks, chunk = k % kChunks;
    if (row >= tile.rows || 8 * chunk >= tile.columns) continue;
    const uint4 words = shared_load(
        reinterpret_cast<const uint4*>(memory + row * kRowBytes + (chunk ^ row % 8) * 16));
    T* start =
        static_cast<T*>(target.data) + (tile.row + row) * target.stride + tile.column + 8 * chunk;
    if (target.wide && 8 * chunk + 8 <= tile.columns) {
      store_words(reinterpret_cast<uint4*>(start), words);
      continue;
    }
    const uint32_t parts[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = static_cast<uint16_t>(parts[i / 2] >> (i % 2 * 16));
      if (8 * chunk + i < tile.columns) memcpy(start + i, &bits, 2);
    }
  }
}

// All threads of the team call.
template <class Team>
__device__ __forceinline__ void store_gradient(const GradientTile& target, const Tile& tile,
                                               const Team& team,
                                               const typename Team::Values& values,
                                               unsigned char* memory) {
  if (target.dtype == DType::kFloat32) {
    store_direct<float>(target, tile, team, values);
  } else if (target.dtype == DType::kBFloat16) {
    store_through<__nv_bfloat16>(target, tile, team, values, memory);
  } else {
    store_through<__half>(target, tile, team, values, memory);
  }
}

}  // namespace unitsface::cuda
