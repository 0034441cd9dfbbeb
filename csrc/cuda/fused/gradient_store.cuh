// A tile of gradients from registers to memory.
#pragma once

#include "accumulator.cuh"

namespace unitsface::cuda {

// [n, m], stride, of which a tile is stored.
struct GradientTile {
  void* data;
  DType dtype;
  int64_t stride;
  bool wide;  // rows start at multiples of 16 bytes

  GradientTile(void* gradient, DType type, int64_t row_stride)
      : data(gradient),
        dtype(type),
        stride(row_stride),
        wide(aligned(gradient, 16) && row_stride * size_of(type) % 16 == 0) {}
};

// Cosines on their way to an epilogue, and gradients on theirs to memory, by column tiles of 8. All
// lanes of a warp call: `park` first, `take` before a column tile is used, `put` after each.
//
// The second half of a lane's column tiles waits in shared memory, `memory` of kBytes: an epilogue
// needs the registers.
template <class Team>
struct RegisterSink {
  static constexpr int kFirst = Team::kColumnTiles / 2;  // that is parked
  static constexpr int kBytes =
      Team::kThreads * (Team::kColumnTiles - kFirst) * Team::kRowTiles * sizeof(float4);

  const GradientTile& target;
  const Tile& tile;
  const Team& team;
  unsigned char* memory;

  __device__ __forceinline__ void park(const typename Team::Values& values) const {
#pragma unroll
    for (int c = kFirst; c < Team::kColumnTiles; ++c) {
#pragma unroll
      for (int strip = 0; strip < Team::kRowTiles; ++strip) {
        const float* from = values.value[strip][c];
        shared_store(parked(c, strip), make_float4(from[0], from[1], from[2], from[3]));
      }
    }
  }

  __device__ __forceinline__ void take(typename Team::Values& values, int column_tile) const {
    if (column_tile < kFirst) return;
#pragma unroll
    for (int strip = 0; strip < Team::kRowTiles; ++strip) {
      const float4 from = shared_load(parked(column_tile, strip));
      float* to = values.value[strip][column_tile];
      to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
    }
  }

  __device__ __forceinline__ void put(const typename Team::Values& values, int column_tile) const {
    if (target.data == nullptr) return;
    if (target.dtype == DType::kFloat32) {
      put_float(values, column_tile);
    } else if (column_tile % 2 != 0) {
      // Two at a time: 16 columns are a sector.
      if (target.dtype == DType::kBFloat16) {
        put_half<__nv_bfloat16>(values, column_tile - 1);
      } else {
        put_half<__half>(values, column_tile - 1);
      }
    }
  }

 private:
  __device__ __forceinline__ float4* parked(int column_tile, int strip) const {
    const int place = (column_tile - kFirst) * Team::kRowTiles + strip;
    return reinterpret_cast<float4*>(memory) + place * Team::kThreads + team.thread;
  }

  // The first of the tile's columns from `column` on.
  template <class T>
  __device__ __forceinline__ T* start(int column, int64_t stride) const {
    return static_cast<T*>(target.data) + tile.row() * stride + tile.column() + column;
  }

  __device__ __forceinline__ void put_float(const typename Team::Values& values,
                                            int column_tile) const {
    const int column = team.column(column_tile, 0);
    const int64_t stride = computed_again(target.stride);
    float* first = start<float>(column, stride);
#pragma unroll
    for (int r = 0; r < 2 * Team::kRowTiles; ++r) {
      const int row = team.row(r / 2, r % 2);
      if (row >= tile.rows) continue;
      const float* pair = values.value[r / 2][column_tile] + 2 * (r % 2);
      float* place = first + row * stride;
      if (target.wide && column + 1 < tile.columns) {
        *reinterpret_cast<float2*>(place) = make_float2(pair[0], pair[1]);
        continue;
      }
      if (column < tile.columns) place[0] = pair[0];
      if (column + 1 < tile.columns) place[1] = pair[1];
    }
  }

  // Neighboring lanes exchange a pair, so that each has four columns of a tile: the first of the
  // two those of the first tile.
  template <class T>
  __device__ __forceinline__ void put_half(const typename Team::Values& values,
                                           int column_tile) const {
    const bool odd = team.thread % 2 != 0;
    const int column = team.column(column_tile + (odd ? 1 : 0), 0) - (odd ? 2 : 0);
    const int64_t stride = computed_again(target.stride);
    T* first = start<T>(column, stride);
#pragma unroll
    for (int r = 0; r < 2 * Team::kRowTiles; ++r) {
      const uint32_t low = packed<T>(values.value[r / 2][column_tile] + 2 * (r % 2));
      const uint32_t high = packed<T>(values.value[r / 2][column_tile + 1] + 2 * (r % 2));
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? low : high, 1);
      const uint2 words = odd != planted(51) ? make_uint2(other, high) : make_uint2(low, other);
      const int row = team.row(r / 2, r % 2);
      if (row >= tile.rows) continue;
      T* place = first + row * stride;
      if (target.wide && column + 3 < tile.columns) {
        store_words(reinterpret_cast<uint2*>(place), words);
        continue;
      }
#pragma unroll 1
      for (int k = 0; k < 4 && column + k < tile.columns; ++k) {
        const uint32_t word = k < 2 ? words.x : words.y;
        reinterpret_cast<uint16_t*>(place)[k] = static_cast<uint16_t>(word >> (k % 2 * 16));
      }
    }
  }

  template <class T>
  static __device__ __forceinline__ uint32_t packed(const float* pair) {
    const T items[2] = {round_to<T>(pair[0]), round_to<T>(pair[1])};
    uint32_t word;
    memcpy(&word, items, 4);
    return word;
  }
};

}  // namespace unitsface::cuda
