// What follows the products of a `sum` loss that is a softplus of a logit linear in the cosine, for
// teams of LaneRows: gradients in place of cosines, and sums of losses and threshold gradients over
// the rows and columns of the tile.
//
// The sum of a row takes one logarithm for a lane's 32 pairs, that of a column one for the 32 of a
// warp (epilogue_softplus.cuh).
#pragma once

#include "../partials.h"
#include "epilogue_softplus.cuh"
#include "lane_rows_sm90.cuh"

namespace unitsface::cuda {

// sum log(1 + e^z) over pairs: sum max(z, 0) and prod(1 + e^-|z|) - 1. Positives have a product of
// their own if their weight is another one; the first sum is weighted.
template <class Policy>
struct SoftplusSum {
  static constexpr int kProducts = Policy::kWeighted ? 2 : 1;

  float top, products[kProducts];

  __device__ __forceinline__ void clear() {
    top = 0.0f;
#pragma unroll
    for (float& product : products) product = 0.0f;
  }
  __device__ __forceinline__ void add(float weighted_top, float exponential, bool positive) {
    top += weighted_top;
#pragma unroll
    for (int p = 0; p < kProducts; ++p) {
      multiply(products[p], kProducts == 1 || positive == (p == 1) ? exponential : 0.0f);
    }
  }
  static __device__ __forceinline__ void multiply(float& product, float factor) {
    product = fmaf(product, factor, product + factor);
  }
  // Over the lanes that share a column.
  __device__ __forceinline__ void combine_column() {
    top = sum_of_column(top);
#pragma unroll
    for (float& product : products) {
#pragma unroll
      for (int mask = 4; mask < kLanes; mask *= 2) {
        multiply(product, __shfl_xor_sync(kAllLanes, product, mask));
      }
    }
  }
  __device__ __forceinline__ float value(const Policy& policy) const {
    if constexpr (Policy::kWeighted) {
      return top + policy.weight(false) * log1pf(products[0]) +
             policy.weight(true) * log1pf(products[1]);
    }
    return top + log1pf(products[0]);
  }
};

// Shared memory. Of a column: threshold, weight of the mirrored gradient, weight of the threshold's
// gradient in the other direction; of a warp's 32 pairs of each the sums.
template <class Policy>
struct alignas(16) SumStripsShared {
  float4 columns[kTileColumns];
  int64_t labels[kTileColumns];
  SoftplusSum<Policy> losses[4][kTileColumns];
  float dthresholds[4][kTileColumns];
  float totals[4];
};

template <class Policy, class Team>
__device__ __forceinline__ void stage_columns(SumStripsShared<Policy>& shared, const SumTile& args,
                                              const Tile& tile, const Team& team) {
  stage_labels(shared.labels, args.b_labels, tile, team);
  for (int place = team.thread; place < tile.columns; place += Team::kThreads) {
    const int64_t j = tile.column() + place;
    const float weight = args.b_weights != nullptr ? __ldg(args.b_weights + j) : 1.0f;
    shared_store(
        &shared.columns[place],
        make_float4(__ldg(args.b_threshold + (args.per_column ? j : 0)),
                    args.mirrored ? weight : 0.0f, args.b_loss != nullptr ? weight : 0.0f, 0.0f));
  }
}

// What all warps have of the columns, and the total of the threshold's gradient.
template <bool kColumns, class Policy, class Team>
__device__ __forceinline__ void write_columns(const Policy& policy, SumStripsShared<Policy>& shared,
                                              const SumTile& args, const SumPartials& partials,
                                              const Tile& tile, const Team& team) {
  for (int place = team.thread; kColumns && place < tile.columns; place += Team::kThreads) {
    float loss = 0.0f, dthreshold = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Team::kRowWarps; ++warp) {
      loss += shared_load(&shared.losses[warp][place]).value(policy);
      dthreshold += shared_load(&shared.dthresholds[warp][place]);
    }
    const int64_t target = tile.row_block * args.m + tile.column() + place;
    if (partials.column_loss != nullptr) partials.column_loss[target] = loss;
    if (!args.per_column || partials.column_dthreshold == nullptr) continue;
    partials.column_dthreshold[target] = dthreshold;
  }
  if (args.per_column || partials.column_dthreshold == nullptr || team.thread > 0) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < Team::kRowWarps; ++warp) total += shared_load(&shared.totals[warp]);
  partials.column_dthreshold[tile.row_block * partials.column_blocks + tile.column_block] = total;
}

// Both directions of a pair have one threshold. kColumns: there are sums of columns. `values`:
// cosines, afterwards the gradient. All threads of the team call; `memory` has
// sizeof(SumStripsShared<Policy>), aligned to 16 bytes.
template <bool kColumns, class Policy, class Team>
__device__ __forceinline__ void strip_sums(const Policy& policy, const SumTile& args,
                                           const SumPartials& partials, const Tile& tile,
                                           const Team& team, typename Team::Values& values,
                                           unsigned char* memory) {
  constexpr int kStrip = kColumns && Policy::kWeighted ? 1 : kStripTiles;
  static_assert(Policy::kUniformSlope, "a finite slope for any cosine");
  static_assert(Team::kRowWarps <= 4 && Team::kColumnWarps == 1, "sums of warps");
  SumStripsShared<Policy>& shared = *reinterpret_cast<SumStripsShared<Policy>*>(memory);
  stage_columns(shared, args, tile, team);
  const LaneRows<Team> rows(args.a_labels, args.diagonal, tile, team);
  float weights[rows.kCount];
  SoftplusSum<Policy> losses[rows.kCount];
#pragma unroll
  for (int r = 0; r < rows.kCount; ++r) {
    const int row = team.row(r / 2, r % 2);
    const bool weighted = args.a_weights != nullptr && row < tile.rows;
    weights[r] = weighted ? __ldg(args.a_weights + tile.row() + row) : 1.0f;
    losses[r].clear();
  }
  float total = 0.0f;  // of the threshold's gradient
  team.wait();
#pragma unroll
  for (int c = 0; c < Team::kColumnTiles; ++c) {
    if (c % kStrip == 0 && 8 * c >= tile.columns) break;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int column = team.column(c, which);
      const int64_t label = shared_load(&shared.labels[column]);
      float4 of_column = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (column < tile.columns) of_column = shared_load(&shared.columns[column]);
      SoftplusSum<Policy> loss;
      loss.clear();
      float dthreshold = 0.0f;
#pragma unroll
      for (int r = 0; r < rows.kCount; ++r) {
        float& value = value_of(values, r, c, which);
        const bool positive = rows.labels[r] == label;
        const Logit logit = policy.logit(value, of_column.x, positive);
        // Selected: the cosine of a pair that is left out may be NaN.
        const bool counted = rows.counts(r, c, which, label);
        const float z = counted ? (positive ? -logit.value : logit.value) : -INFINITY;
        const Softplus2 parts = softplus_parts(z, positive ? -1.0f : 1.0f);
        float top = fmaxf(z, 0.0f), sigmoid = parts.sigmoid;
        if constexpr (Policy::kWeighted) {
          top *= policy.weight(positive);
          sigmoid *= policy.weight(positive);
        }
        losses[r].add(top, parts.exponential, positive);
        if (kColumns) loss.add(top, parts.exponential, positive);
        dthreshold += sigmoid * (weights[r] + of_column.z);
        value = sigmoid * (weights[r] + of_column.y) * (logit.dcosine * args.gradient_scale);
      }
      dthreshold *= Policy::kThresholdSlope;
      total += dthreshold;
      if constexpr (kColumns) {
        loss.combine_column();
        dthreshold = sum_of_column(dthreshold);
        if (team.lane() >= 4) continue;
        shared_store(&shared.losses[team.row_warp()][column], loss);
        shared_store(&shared.dthresholds[team.row_warp()][column], dthreshold);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < rows.kCount; ++r) {
    const int row = team.row(r / 2, r % 2);
    const float loss = sum_of_row(losses[r].value(policy));
    if (team.lane() % 4 != 0 || row >= tile.rows) continue;
    partials.row_loss[tile.column_block * args.n + tile.row() + row] = loss;
  }
  total = warp_sum(total);
  if (team.lane() == 0) shared_store(&shared.totals[team.row_warp()], total);
  team.wait();
  write_columns<kColumns>(policy, shared, args, partials, tile, team);
}

}  // namespace unitsface::cuda
