// What follows the products of a loss of log-sum-exps over samples, for teams of LaneRows: the
// gradient, or what positives add to the rows and columns of the tile.
#pragma once

#include "../kernels.h"
#include "../pair_kind.cuh"
#include "lane_rows_sm90.cuh"
#include "log_sum_strips.cuh"

namespace unitsface::cuda {

constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ float minimum_keep_nan(float x, float y) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
#else
  return x > y ? y : x;
#endif
}

// Columns of a tile, in shared memory.
struct PairColumns {
  PairSide sides[kTileColumns];
  int64_t labels[kTileColumns];
};

// What pairs read of a row or column, with logarithms to base 2 and weights times `scale`.
template <bool kTwo>
__device__ __forceinline__ PairSide scaled_side(const float* log_negatives,
                                                const float* negative_weight,
                                                const float* positive_weight,
                                                const float* log_positives, int64_t place,
                                                float scale) {
  return {kLog2E * __ldg(log_negatives + place), scale * __ldg(negative_weight + place),
          scale * __ldg(positive_weight + place),
          kTwo ? kLog2E * __ldg(log_positives + place) : 0.0f};
}

// pair_slope and pair_slope_of_two of such a side. Below 2^-126, e^gap is 0.
template <bool kTwo>
__device__ __forceinline__ float scaled_slope(float z, bool positive, const PairSide& side) {
  const float log = kTwo && positive ? side.log_positives : side.log_negatives;
  const float e = exp2_approximate(minimum_keep_nan(fmaf(z, kLog2E, -log), 126.0f));
  if (kTwo) return (positive ? side.positive_weight : side.negative_weight) * e;
  return positive ? -divide_by_unit(side.positive_weight, 1.0f + e) : side.negative_weight * e;
}

// `values`: cosines, afterwards the gradient. All threads of the team call; `memory` has
// sizeof(PairColumns), aligned to 16 bytes.
template <bool kTwo, bool kBoth, class Policy, class Team>
__device__ __forceinline__ void strip_pair_gradients(const Policy& policy, const PairGradient& args,
                                                     const Tile& tile, const Team& team,
                                                     typename Team::Values& values,
                                                     unsigned char* memory) {
  PairColumns& columns = *reinterpret_cast<PairColumns*>(memory);
  stage_labels(columns.labels, args.b_labels, tile, team);
  for (int place = team.thread; kBoth && place < tile.columns; place += Team::kThreads) {
    shared_store(
        &columns.sides[place],
        scaled_side<kTwo>(args.b_log_negatives, args.b_negative_weight, args.b_positive_weight,
                          args.b_log_positives, tile.column() + place, args.gradient_scale));
  }
  const LaneRows<Team> rows(args.a_labels, args.diagonal, tile, team);
  PairSide sides[rows.kCount];
#pragma unroll
  for (int r = 0; r < rows.kCount; ++r) {
    const int row = team.row(r / 2, r % 2);
    sides[r] = {};
    if (row >= tile.rows) continue;
    sides[r] =
        scaled_side<kTwo>(args.a_log_negatives, args.a_negative_weight, args.a_positive_weight,
                          args.a_log_positives, tile.row() + row, args.gradient_scale);
  }
  if (!planted(41)) team.wait();
#pragma unroll
  for (int c = 0; c < Team::kColumnTiles; ++c) {
    if (c % kStripTiles == 0 && 8 * c >= tile.columns) break;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int column = team.column(c, which);
      const int64_t label = shared_load(&columns.labels[column]);
      PairSide side = {};
      if (kBoth && column < tile.columns) side = shared_load(&columns.sides[column]);
#pragma unroll
      for (int r = 0; r < rows.kCount; ++r) {
        float& value = value_of(values, r, c, which);
        const bool same = rows.labels[r] == label, positive = Policy::kPositives && same;
        const Logit z = pair_logit(policy, value, same);
        float slope = scaled_slope<kTwo>(z.value, positive, sides[r]);
        if (kBoth) slope += scaled_slope<kTwo>(z.value, positive, side);
        const bool counted = rows.counts(r, c, which, label) && (Policy::kPositives || !same);
        // Selected, not multiplied: the cosine of an excluded pair may be NaN.
        value = counted ? slope * z.dcosine : 0.0f;
      }
    }
  }
}

// Of positives: a strip's cosines of the lanes, by column, and sums of the columns.
template <bool kBoth>
struct PositivesShared {
  float4 cosines[2 * kStripTiles][kTileRows];
  StripStatistics columns;
  float log_negatives[kBoth ? kTileColumns : 4];
  int64_t labels[kTileColumns];
};

// Softplus and sigmoid of (log_negatives - z), summed over the positives of rows and columns.
// Positives are few: a warp passes by the strips that have none, and by the columns of the others.
template <bool kBoth, class Policy, class Team>
__device__ __forceinline__ void strip_positives(const Policy& policy, const PairPositives& args,
                                                const Partials& of_rows, const Partials& of_columns,
                                                const Tile& tile, const Team& team,
                                                const typename Team::Values& values,
                                                unsigned char* memory) {
  static_assert(Team::kThreads == kTileRows && LaneRows<Team>::kCount == 4, "float4 of a lane");
  PositivesShared<kBoth>& shared = *reinterpret_cast<PositivesShared<kBoth>*>(memory);
  stage_labels(shared.labels, args.b_labels, tile, team);
  if (kBoth) {
    const int place = team.thread;
    for (int warp = 0; warp < Team::kRowWarps; ++warp) shared.columns.put(warp, place, {});
    if (place < tile.columns) {
      shared_store(&shared.log_negatives[place],
                   __ldg(args.b_log_negatives + tile.column() + place));
    }
  }
  const LaneRows<Team> rows(args.a_labels, args.diagonal, tile, team);
  float log_negatives[rows.kCount], losses[rows.kCount] = {}, probs[rows.kCount] = {};
#pragma unroll
  for (int r = 0; r < rows.kCount; ++r) {
    const int row = team.row(r / 2, r % 2);
    log_negatives[r] = row < tile.rows ? __ldg(args.a_log_negatives + tile.row() + row) : 0.0f;
  }
  team.wait();
#pragma unroll
  for (int first = 0; first < Team::kColumnTiles; first += kStripTiles) {
    if (8 * first >= tile.columns) break;
    unsigned positives = 0;  // a bit for each pair, by column
#pragma unroll
    for (int k = 0; k < 2 * kStripTiles; ++k) {
      const int c = first + k / 2, which = k % 2;
      const int64_t label = shared_load(&shared.labels[team.column(c, which)]);
#pragma unroll
      for (int r = 0; r < rows.kCount; ++r) {
        const bool counted = rows.labels[r] == label && rows.counts(r, c, which, label);
        positives |= counted ? 1u << (rows.kCount * k + r) : 0u;
      }
    }
    if (__ballot_sync(kAllLanes, positives != 0) == 0) continue;
#pragma unroll
    for (int k = 0; k < 2 * kStripTiles; ++k) {
      const int c = first + k / 2, which = k % 2;
      shared_store(&shared.cosines[k][team.thread],
                   make_float4(value_of(values, 0, c, which), value_of(values, 1, c, which),
                               value_of(values, 2, c, which), value_of(values, 3, c, which)));
    }
#pragma unroll 1
    for (int k = 0; k < 2 * kStripTiles; ++k, positives >>= rows.kCount) {
      const bool own = (positives & 15u) != 0;
      if (planted(43) ? !own : __ballot_sync(kAllLanes, own) == 0) continue;
      const int column = team.column(first + k / 2, k % 2);
      const float4 cosines = shared_load(&shared.cosines[k][team.thread]);
      const float of_lane[] = {cosines.x, cosines.y, cosines.z, cosines.w};
      const float log = kBoth && own ? shared_load(&shared.log_negatives[column]) : 0.0f;
      float loss = 0.0f, prob = 0.0f;
#pragma unroll
      for (int r = 0; r < rows.kCount; ++r) {
        if ((positives >> r & 1) == 0) continue;
        const float z = policy.positive(of_lane[r]).value;
        const Softplus of_row = softplus(log_negatives[r] - z);
        losses[r] += of_row.value;
        probs[r] += of_row.sigmoid;
        if (!kBoth) continue;
        const Softplus of_column = softplus(log - z);
        loss += of_column.value;
        prob += of_column.sigmoid;
      }
      if (!kBoth) continue;
      loss = sum_of_column(loss);
      prob = sum_of_column(prob);
      if (team.lane() < 4) shared.columns.put(team.row_warp(), column, {loss, prob});
    }
  }
#pragma unroll
  for (int r = 0; r < rows.kCount; ++r) {
    const int row = team.row(r / 2, r % 2);
    const float loss = sum_of_row(losses[r]), prob = sum_of_row(probs[r]);
    if (team.lane() % 4 != 0 || row >= tile.rows) continue;
    of_rows.write(tile.column_block, tile.row() + row, {loss, prob});
  }
  if (!kBoth) return;
  team.wait();
  shared.columns.template write<PlainSums>(of_columns, tile.row_block, tile.column(), tile.columns,
                                           Team::kRowWarps, team);
}

}  // namespace unitsface::cuda
