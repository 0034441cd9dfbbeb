// Cosines of a tile with the instructions of sm_80: a pipeline of asynchronous copies to shared
// memory, and mma.sync, or fused multiply-adds for exact float32.
//
// A stage has 64 bytes of every row and column of the tile, whatever the type: ldmatrix and the
// fragments of mma.sync do not depend on it either. Of the two rows that share 128 bytes, chunks of
// 16 bytes are permuted, so that the 8 rows of a matrix are in different banks.
#pragma once

#include "accumulator.cuh"
#include "operands.h"

namespace unitsface::cuda {

constexpr int kStages = 3;
constexpr int kStageDepth = 64;  // bytes of a row
constexpr int kOperandBytes = kTileRows * kStageDepth;
constexpr int kStageBytes = 2 * kOperandBytes;
// As much as a kernel has without opting in to more; two blocks fit on every multiprocessor.
constexpr int kPipelineBytes = kStages * kStageBytes;
static_assert(kPipelineBytes <= 48 << 10, "static shared memory");

using BlockTeam = Team<4, 4, 2, 4, 16, BlockBarrier>;
static_assert(BlockTeam::kThreads == kThreads, "launch() starts as many");

enum class Multiply { kBFloat16, kFloat16, kTf32, kFloat32 };

__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kStageDepth + ((chunk ^ (row / 2 % 4)) * 16);
}

// Copies of a thread: chunk thread % 4 of rows thread / 4 and thread / 4 + 64 of either operand.
struct StageCopies {
  static constexpr int kStep = kThreads / 4;

  const char *a, *b;       // the thread's first chunk of each
  int a_stride, b_stride;  // bytes
  int bytes;               // from the chunk to the end of its row
  int place;               // in a stage
  unsigned inside;         // a bit for each row
  bool wide;               // rows start at multiples of 16 bytes

  __device__ __forceinline__ StageCopies(const FusedOperands& t, const Tile& tile) {
    const int element = t.dtype == DType::kFloat32 ? 4 : 2;
    const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
    bytes = static_cast<int>(t.depth) * element - 16 * chunk;
    place = swizzled(row, chunk);
    a_stride = static_cast<int>(t.a_stride) * element;
    b_stride = static_cast<int>(t.b_stride) * element;
    inside = (row < tile.rows ? 1u : 0u) | (row + kStep < tile.rows ? 2u : 0u) |
             (row < tile.columns ? 4u : 0u) | (row + kStep < tile.columns ? 8u : 0u);
    a = static_cast<const char*>(t.a) + (tile.row() + row) * a_stride + 16 * chunk;
    b = static_cast<const char*>(t.b) + (tile.column() + row) * b_stride + 16 * chunk;
    const auto bits = reinterpret_cast<uintptr_t>(t.a) | reinterpret_cast<uintptr_t>(t.b) |
                      static_cast<uintptr_t>(a_stride) | static_cast<uintptr_t>(b_stride);
    wide = bits % 16 == 0 || planted(58);
  }

  __device__ __forceinline__ void copy(unsigned char* stage, int step) const {
    const int offset = step * kStageDepth;
    const int left = planted(49) ? 16 : min(max(bytes - offset, 0), 16);
    // The last chunk of a row may end with it.
    if (wide && (left == 0 || left == 16)) {
#pragma unroll
      for (int k = 0; k < 4; ++k) copy_chunk<true>(stage, offset, left, k);
    } else {
#pragma unroll 1
      for (int k = 0; k < 4; ++k) copy_chunk<false>(stage, offset, left, k);
    }
  }

 private:
  // k: first and second row of a, then of b.
  template <bool kWide>
  __device__ __forceinline__ void copy_chunk(unsigned char* stage, int offset, int left,
                                             int k) const {
    const bool second = k % 2 != 0, of_b = k >= 2;
    const int64_t step = second ? static_cast<int64_t>(kStep) * (of_b ? b_stride : a_stride) : 0;
    const char* source = (of_b ? b : a) + step + offset;
    const int count = (inside >> k & 1) != 0 || planted(48) ? left : 0;
    // The permutation of chunks has a period of 8 rows.
    static_assert(kStep % 8 == 0, "the second row's chunk has the same place");
    unsigned char* target =
        stage + (of_b ? kOperandBytes : 0) + (second ? kStep * kStageDepth : 0) + place;
    if constexpr (kWide) {
      if (count > 0) {
        copy_async(target, source);
      } else {
        shared_store(reinterpret_cast<uint4*>(target), make_uint4(0, 0, 0, 0));
      }
    } else {
      copy_elements(target, source, count);
    }
  }

  // Rows that start anywhere: slow, but any of them.
  __device__ __forceinline__ void copy_elements(unsigned char* target, const char* source,
                                                int bytes) const {
#pragma unroll 1
    for (int place = 0; place < 16; place += 2) {
      uint16_t bits = 0;
      if (place < bytes) bits = __ldg(reinterpret_cast<const uint16_t*>(source + place));
      shared_store(reinterpret_cast<uint16_t*>(target + place), bits);
    }
  }
};

template <Multiply kMultiply>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (kMultiply == Multiply::kBFloat16) {
    multiply_bf16(c, a, b0, b1);
  } else if constexpr (kMultiply == Multiply::kFloat16) {
    multiply_f16(c, a, b0, b1);
  } else {
    multiply_tf32(c, a, b0, b1);
  }
}

// Words of a fragment. Conversions that the type needs are done once per fragment, not once per
// multiplication.
template <Multiply kMultiply>
__device__ __forceinline__ void load_fragment(uint32_t (&words)[4], const unsigned char* row) {
  load_matrices(words, row + (planted(53) ? 8 : 0));
  if constexpr (kMultiply == Multiply::kTf32) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!planted(57)) words[k] = round_to_tf32(words[k]);
    }
  }
}

// A stage's share of the sums, by tensor cores: two steps of 32 bytes.
template <Multiply kMultiply>
__device__ __forceinline__ void add_products(BlockTeam::Values& sums, const BlockTeam& team,
                                             const unsigned char* stage) {
  const int lane = team.lane();
  // Lane l names row l % 8 of matrix l / 8: for a, (rows, chunk) + (0, 0), (8, 0), (0, 1), (8, 1);
  // for b, columns take the place of the chunk.
  const int a_row = team.first_row() + lane % 16, a_chunk = lane / 16;
  const int b_row = team.first_column() + lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
  // The permutation of chunks has a period of 8 rows, and the second step exchanges pairs of them.
  constexpr int kTile = 16 * kStageDepth;
  const int a_place = planted(44) ? a_row * kStageDepth + a_chunk * 16 : swizzled(a_row, a_chunk);
  const int b_place = kOperandBytes + swizzled(b_row, b_chunk);
  // Rounding takes registers.
#pragma unroll(kMultiply == Multiply::kTf32 ? 1 : 2)
  for (int step = 0; step < 2; ++step) {
    const unsigned char* a_stage = stage + (a_place ^ (32 * step));
    const unsigned char* b_stage = stage + (b_place ^ (32 * step));
    uint32_t b[BlockTeam::kColumnTiles / 2][4];
#pragma unroll
    for (int pair = 0; pair < BlockTeam::kColumnTiles / 2; ++pair) {
      load_fragment<kMultiply>(b[pair], b_stage + pair * kTile);
    }
#pragma unroll
    for (int row_tile = 0; row_tile < BlockTeam::kRowTiles; ++row_tile) {
      uint32_t a[4];
      load_fragment<kMultiply>(a, a_stage + row_tile * kTile);
      if (planted(45)) {
        const uint32_t swap = a[1];
        a[1] = a[2], a[2] = swap;
      }
#pragma unroll
      for (int tile = 0; tile < BlockTeam::kColumnTiles; ++tile) {
        const uint32_t (&words)[4] = b[tile / 2];
        const int first = tile % 2 * 2 + (planted(46) ? 1 : 0);
        multiply<kMultiply>(sums.value[row_tile][tile], a, words[first], words[first ^ 1]);
      }
    }
  }
}

// The same in float32, in the order of the depth.
template <>
__device__ __forceinline__ void add_products<Multiply::kFloat32>(BlockTeam::Values& sums,
                                                                 const BlockTeam& team,
                                                                 const unsigned char* stage) {
#pragma unroll 1
  for (int k = 0; k < kStageDepth / 8; ++k) {
    const int half = k % 2 * 8;
    float2 b[2 * BlockTeam::kColumnTiles];
#pragma unroll
    for (int c = 0; c < 2 * BlockTeam::kColumnTiles; ++c) {
      const int place = kOperandBytes + swizzled(team.column(c / 2, c % 2), k / 2) + half;
      b[c] = shared_load(reinterpret_cast<const float2*>(stage + place));
    }
#pragma unroll
    for (int r = 0; r < 2 * BlockTeam::kRowTiles; ++r) {
      const int place = swizzled(team.row(r / 2, r % 2), k / 2) + half;
      const float2 a = shared_load(reinterpret_cast<const float2*>(stage + place));
#pragma unroll
      for (int c = 0; c < 2 * BlockTeam::kColumnTiles; ++c) {
        float& sum = sums.value[r / 2][c / 2][2 * (r % 2) + c % 2];
        sum = fmaf(a.y, b[c].y, fmaf(a.x, b[c].x, sum));
      }
    }
  }
}

template <Multiply kMultiply>
__device__ __forceinline__ void multiply_tile(BlockTeam::Values& sums, const BlockTeam& team,
                                              const FusedOperands& operands, const Tile& tile,
                                              unsigned char* memory) {
  const StageCopies copies(operands, tile);
  const int row_bytes = static_cast<int>(operands.depth * size_of(operands.dtype));
  const int steps = (row_bytes + kStageDepth - 1) / kStageDepth;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) copies.copy(memory + stage * kStageBytes, stage);
    commit_copies();
  }
  int current = 0, next = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (planted(43)) {
      wait_for_copies<kStages - 1>();
    } else if (!planted(41)) {
      wait_for_copies<kStages - 2>();
    }
    // All have what this thread copied, and have read what it overwrites next.
    if (!planted(42)) team.wait();
    if (step + kStages - 1 < steps) {
      const int ahead = step + kStages - (planted(59) ? 0 : 1);
      copies.copy(memory + (planted(47) ? current : next) * kStageBytes, ahead);
    }
    // Groups are counted: the last ones are empty.
    if (!planted(54)) commit_copies();
    add_products<kMultiply>(sums, team, memory + current * kStageBytes);
    current = current + 1 == kStages ? 0 : current + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
}

// The block's tile, and its cosines. `memory` has kPipelineBytes, aligned to 128, and is free again
// afterwards; a kernel declares it itself, since of a pointer that a function or a struct hands out
// the compiler does not know that it is one to shared memory.
__device__ __forceinline__ Tile multiply_sm80(BlockTeam::Values& sums, const BlockTeam& team,
                                              const FusedOperands& operands, const TileOrder& order,
                                              unsigned char* memory) {
  declare_shared(memory, kPipelineBytes);
  const Tile tile = order.at(blockIdx.x);
#pragma unroll
  for (int r = 0; r < BlockTeam::kRowTiles; ++r) {
#pragma unroll
    for (int c = 0; c < BlockTeam::kColumnTiles; ++c) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums.value[r][c][k] = 0.0f;
    }
  }
  // Types differ in this loop only: one kernel serves all of them.
  if (operands.dtype == DType::kBFloat16) {
    multiply_tile<Multiply::kBFloat16>(sums, team, operands, tile, memory);
  } else if (operands.dtype == DType::kFloat16) {
    multiply_tile<Multiply::kFloat16>(sums, team, operands, tile, memory);
  } else if (operands.tf32) {
    multiply_tile<Multiply::kTf32>(sums, team, operands, tile, memory);
  } else {
    multiply_tile<Multiply::kFloat32>(sums, team, operands, tile, memory);
  }
  if (!planted(50)) team.wait();
  return order.at(computed_again(blockIdx.x));
}

}  // namespace unitsface::cuda
