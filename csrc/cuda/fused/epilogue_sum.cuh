// What follows the products of a `sum` loss: every pair's term, its gradient in place of its
// cosine, and sums of losses and threshold gradients over the rows and columns of the tile.
#pragma once

#include "../partials.h"
#include "../sum_terms.cuh"
#include "pair_masks.cuh"

namespace unitsface::cuda {

// Shared memory of the epilogue, for any team.
struct SumShared {
  static constexpr int kMostWarps = 4;

  TileLabels labels;
  float2 rows[kTileRows];        // weight, threshold
  float4 columns[kTileColumns];  // weights of the mirrored gradient and of `other`, threshold
  float row_sums[2][kMostWarps][kTileRows];
  float column_sums[2][kMostWarps][kTileColumns];
  float totals[2 * kMostWarps];
};

template <class Team>
__device__ __forceinline__ void stage_values(SumShared& shared, const SumTile& args,
                                             const Tile& tile, const Team& team) {
  static_assert(kTileRows == kTileColumns, "places of both");
  for (int place = team.thread; place < kTileRows; place += Team::kThreads) {
    const int64_t i = tile.row() + place, j = tile.column() + place;
    float2 row = make_float2(1.0f, 0.0f);
    float4 column = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (place < tile.rows) {
      if (args.a_weights != nullptr) row.x = __ldg(args.a_weights + i);
      if (args.per_column && args.a_threshold != nullptr) row.y = __ldg(args.a_threshold + i);
    }
    if (place < tile.columns) {
      const float weight = args.b_weights != nullptr ? __ldg(args.b_weights + j) : 1.0f;
      if (args.mirrored) column.x = weight;
      if (args.b_loss != nullptr) column.y = weight;
      column.z = __ldg(args.b_threshold + (args.per_column ? j : 0));
    }
    shared_store(&shared.rows[place], row);
    shared_store(&shared.columns[place], column);
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
      const int64_t target = static_cast<int64_t>(tile.column_block) * args.n + tile.row() + place;
      partials.row_loss[target] = sum_over_warps(shared.row_sums[0], Team::kColumnWarps, place);
      if (partials.row_dthreshold != nullptr) {
        partials.row_dthreshold[target] =
            sum_over_warps(shared.row_sums[1], Team::kColumnWarps, place);
      }
    }
    if (place < tile.columns) {
      const int64_t target = static_cast<int64_t>(tile.row_block) * args.m + tile.column() + place;
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

// `values`: cosines, afterwards the gradient, which goes to `sink` (gradient_store.cuh). All
// threads of the team call; `memory` has sizeof(SumShared), aligned to 16 bytes.
template <bool kSeparate, class Policy, class Team, class Sink>
__device__ __forceinline__ void sum_epilogue(const Policy& policy, const SumTile& args,
                                             const SumPartials& partials, const Tile& tile,
                                             const Team& team, typename Team::Values& values,
                                             const Sink& sink, unsigned char* memory) {
  static_assert(Team::kRowWarps <= SumShared::kMostWarps, "sums of columns");
  static_assert(Team::kColumnWarps <= SumShared::kMostWarps, "sums of rows");
  SumShared& shared = *reinterpret_cast<SumShared*>(memory);
  sink.park(values);
  stage_values(shared, args, tile, team);
  shared.labels.stage(args.a_labels, args.b_labels, tile, team);
  team.wait();
  const PairMasks<Team> masks(shared.labels, args.diagonal, tile, team);

  constexpr int kRows = 2 * Team::kRowTiles;
  const int lane = team.lane();
  float row_loss[kRows] = {}, row_dthreshold[kRows] = {};
#pragma unroll
  for (int c = 0; c < Team::kColumnTiles; ++c) {
    sink.take(values, c);
    float column_loss[2] = {}, column_dthreshold[2] = {};
#pragma unroll
    for (int strip = 0; strip < Team::kRowTiles; ++strip) {
      // A branch also keeps the compiler from working on all strips at a time, which would take
      // more registers than there are.
      if (!team.has_strip(strip, tile)) continue;
      forget_loads();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int r = 2 * strip + k / 2, which = k % 2;
        float& value = values.value[strip][c][k];
        const float2 of_row = shared_load(&shared.rows[team.row(strip, k / 2)]);
        const float4 of_column = shared_load(&shared.columns[team.column(c, which)]);
        const bool counted = masks.counts(2 * c + which, r);
        const PairTerms terms =
            evaluate_pair<kSeparate>(policy, value, masks.is_same(2 * c + which, r), of_column.z,
                                     of_row.y, {of_row.x, of_column.x, of_column.y});
        // Selected, not multiplied: the cosine of an excluded pair may be NaN.
        row_loss[r] += counted ? terms.row_loss : 0.0f;
        row_dthreshold[r] += counted ? terms.row_dthreshold : 0.0f;
        column_loss[which] += counted ? terms.column_loss : 0.0f;
        column_dthreshold[which] += counted ? terms.column_dthreshold : 0.0f;
        value = counted ? terms.gradient * args.gradient_scale : 0.0f;
      }
    }
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int column = team.column(c, which);
      if (partials.column_loss != nullptr) {
        const float loss = sum_of_column(column_loss[which]);
        if (lane < 4) shared_store(&shared.column_sums[0][team.row_warp()][column], loss);
      }
      if (partials.column_dthreshold != nullptr) {
        const float dthreshold = sum_of_column(column_dthreshold[which]);
        if (lane < 4) shared_store(&shared.column_sums[1][team.row_warp()][column], dthreshold);
      }
    }
    sink.put(values, c);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = team.row(r / 2, r % 2);
    const float loss = planted(52) ? row_loss[r] : sum_of_row(row_loss[r]);
    if (lane % 4 == 0) shared_store(&shared.row_sums[0][team.column_warp()][row], loss);
    if (kSeparate && partials.row_dthreshold != nullptr) {
      const float dthreshold = sum_of_row(row_dthreshold[r]);
      if (lane % 4 == 0) shared_store(&shared.row_sums[1][team.column_warp()][row], dthreshold);
    }
  }
  if (!planted(56)) team.wait();
  write_sums(shared, args, partials, tile, team);
}

}  // namespace unitsface::cuda
