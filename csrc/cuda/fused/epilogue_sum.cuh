// What follows the products of a `sum` loss: every pair's term, its gradient in place of its
// cosine, and sums of losses and threshold gradients over the rows and columns of the tile.
#pragma once

#include "../partials.h"
#include "../sum_terms.cuh"
#include "accumulator.cuh"

namespace unitsface::cuda {

// Shared memory of the epilogue, for any team.
struct SumShared {
  struct alignas(16) Row {
    int64_t label;
    float weight, threshold;
  };
  static constexpr int kMostWarps = 4;

  Row rows[kTileRows];
  float row_sums[2][kMostWarps][kTileRows];
  float column_sums[2][kMostWarps][kTileColumns];
  float totals[2 * kMostWarps];
};

template <class Team>
__device__ __forceinline__ void read_rows(SumShared& shared, const SumTile& args, const Tile& tile,
                                          const Team& team) {
  for (int row = team.thread; row < kTileRows; row += Team::kThreads) {
    const bool inside = row < tile.rows;
    const int64_t i = tile.row + row;
    const bool separate = args.per_column && args.a_threshold != nullptr;
    SumShared::Row values;
    values.label = inside ? __ldg(args.a_labels + i) : -1;
    values.weight = inside && args.a_weights != nullptr ? __ldg(args.a_weights + i) : 1.0f;
    values.threshold = inside && separate ? __ldg(args.a_threshold + i) : 0.0f;
    shared_store(&shared.rows[row], values);
  }
}

// Over `count` warps.
__device__ __forceinline__ float sum_over_warps(
    const float (&sums)[SumShared::kMostWarps][kTileRows], int count, int place) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < SumShared::kMostWarps; ++warp) {
    if (warp < count) sum += shared_load(&sums[warp][place]);
  }
  return sum;
}

template <class Team>
__device__ __forceinline__ void write_sums(SumShared& shared, const SumTile& args,
                                           const SumPartials& partials, const Tile& tile,
                                           const Team& team) {
  static_assert(kTileRows == kTileColumns, "places of both");
  for (int place = team.thread; place < kTileRows; place += Team::kThreads) {
    if (place < tile.rows) {
      const int64_t target = tile.column_block * args.n + tile.row + place;
      partials.row_loss[target] = sum_over_warps(shared.row_sums[0], Team::kColumnWarps, place);
      if (partials.row_dthreshold != nullptr) {
        partials.row_dthreshold[target] =
            sum_over_warps(shared.row_sums[1], Team::kColumnWarps, place);
      }
    }
    if (place < tile.columns) {
      const int64_t target = tile.row_block * args.m + tile.column + place;
      if (partials.column_loss != nullptr) {
        partials.column_loss[target] =
            sum_over_warps(shared.column_sums[0], Team::kRowWarps, place);
      }
      if (partials.column_dthreshold != nullptr && args.per_column) {
        partials.column_dthreshold[target] =
            sum_over_warps(shared.column_sums[1], Team::kRowWarps, place);
      }
    }
  }
  if (partials.column_dthreshold == nullptr || args.per_column) return;
  // Columns outside have added 0.
  float sum = 0.0f;
  for (int place = team.thread; place < kTileColumns; place += Team::kThreads) {
    sum += sum_over_warps(shared.column_sums[1], Team::kRowWarps, place);
  }
  sum = warp_sum(sum);
  if (team.lane() == 0) shared_store(&shared.totals[team.thread / kLanes], sum);
  team.wait();
  if (team.thread > 0) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < Team::kThreads / kLanes; ++warp) {
    total += shared_load(&shared.totals[warp]);
  }
  partials.column_dthreshold[tile.row_block * partials.column_blocks + tile.column_block] = total;
}

// `values`: cosines, afterwards the gradient. All threads of the team call; `memory` is aligned to
// 16 bytes and free when the team has waited.
template <bool kSeparate, class Policy, class Team>
__device__ __forceinline__ void sum_epilogue(const Policy& policy, const SumTile& args,
                                             const SumPartials& partials, const Tile& tile,
                                             const Team& team, typename Team::Values& values,
                                             unsigned char* memory) {
  static_assert(Team::kRowWarps <= SumShared::kMostWarps, "sums of columns");
  static_assert(Team::kColumnWarps <= SumShared::kMostWarps, "sums of rows");
  SumShared& shared = *reinterpret_cast<SumShared*>(memory);
  read_rows(shared, args, tile, team);
  team.wait();

  constexpr int kRows = 2 * Team::kRowTiles;
  const int lane = team.lane();
  const float mirror = args.mirrored ? 1.0f : 0.0f;
  const float other = args.b_loss != nullptr ? 1.0f : 0.0f;
  const int shift = diagonal_shift(tile, args.diagonal);
  float row_loss[kRows] = {}, row_dthreshold[kRows] = {};
#pragma unroll
  for (int c = 0; c < Team::kColumnTiles; ++c) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int column = team.column(c, which);
      const int64_t j = tile.column + column;
      const bool inside = column < tile.columns;
      const int64_t label = inside ? __ldg(args.b_labels + j) : -1;
      const float threshold = inside ? __ldg(args.b_threshold + (args.per_column ? j : 0)) : 0.0f;
      const float weight = inside && args.b_weights != nullptr ? __ldg(args.b_weights + j) : 1.0f;
      float column_loss = 0.0f, column_dthreshold = 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r % 2 == 0) forget_loads();
        const int row = team.row(r / 2, r % 2);
        const SumShared::Row of_row = shared_load(&shared.rows[row]);
        float& value = values.value[r / 2][c][2 * (r % 2) + which];
        const bool counted =
            of_row.label >= 0 && label >= 0 && (row + shift != column || mutated(15));
        const PairTerms terms = evaluate_pair<kSeparate>(
            policy, value, of_row.label == label, threshold, of_row.threshold,
            {of_row.weight, mirror * weight, other * weight});
        // Selected, not multiplied: the cosine of an excluded pair may be NaN.
        row_loss[r] += counted ? terms.row_loss : 0.0f;
        row_dthreshold[r] += counted ? terms.row_dthreshold : 0.0f;
        column_loss += counted ? terms.column_loss : 0.0f;
        column_dthreshold += counted ? terms.column_dthreshold : 0.0f;
        value = counted ? terms.gradient * args.gradient_scale : 0.0f;
      }
      if (partials.column_loss != nullptr) {
        column_loss = sum_of_column(column_loss);
        if (lane < 4) shared_store(&shared.column_sums[0][team.row_warp()][column], column_loss);
      }
      if (partials.column_dthreshold != nullptr) {
        column_dthreshold = sum_of_column(column_dthreshold);
        if (lane < 4) {
          shared_store(&shared.column_sums[1][team.row_warp()][column], column_dthreshold);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = team.row(r / 2, r % 2);
    const float loss = mutated(12) ? row_loss[r] : sum_of_row(row_loss[r]);
    if (lane % 4 == 0) shared_store(&shared.row_sums[0][team.column_warp()][row], loss);
    if (kSeparate && partials.row_dthreshold != nullptr) {
      const float dthreshold = sum_of_row(row_dthreshold[r]);
      if (lane % 4 == 0) shared_store(&shared.row_sums[1][team.column_warp()][row], dthreshold);
    }
  }
  if (!mutated(16)) team.wait();
  write_sums(shared, args, partials, tile, team);
}

}  // namespace unitsface::cuda
