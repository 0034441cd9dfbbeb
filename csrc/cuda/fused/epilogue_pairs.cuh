// What follows the products of a loss of log-sum-exps over samples: statistics of rows and columns
// of the tile, or the gradient.
#pragma once

#include "../pair_kind.cuh"
#include "log_sum_strips.cuh"
#include "pair_masks.cuh"

namespace unitsface::cuda {

struct PairShared {
  TileLabels labels;
  StripStatistics rows, columns;
};

// Partials of a tile; those of columns have no data if the tile serves its rows only.
struct PairPartials {
  Partials rows, columns;

  PairPartials(int64_t n, int64_t m, bool both, float* workspace)
      : rows{workspace, divide_up(m, kTileColumns), n},
        columns{both ? workspace + 2 * rows.segments * n : nullptr, divide_up(n, kTileRows), m} {}
};

template <class Fold, class Team>
__device__ __forceinline__ void write_statistics(const PairShared& shared,
                                                 const PairPartials& partials, const Tile& tile,
                                                 const Team& team) {
  shared.rows.write<Fold>(partials.rows, tile.column_block, tile.row(), tile.rows,
                          Team::kColumnWarps, team);
  if (partials.columns.data == nullptr) return;
  shared.columns.write<Fold>(partials.columns, tile.row_block, tile.column(), tile.columns,
                             Team::kRowWarps, team);
}

// The logit of a pair that a log-sum-exp is over, -inf of others. Selected: the cosine of an
// excluded pair may be NaN.
template <bool kPositive, class Policy, class Team>
__device__ __forceinline__ float counted_logit(const Policy& policy, float cosine,
                                               const PairMasks<Team>& masks, int column, int row) {
  const float z = logit_of_kind<kPositive>(policy, cosine);
  return masks.counts(column, row) && masks.is_same(column, row) == kPositive ? z : -INFINITY;
}

// Maxima and sums of the negatives, or of the positives. Logits are evaluated again for every
// row and every column: there are no registers to keep them in beside the cosines.
template <bool kPositive, class Policy, class Team>
__device__ __forceinline__ void log_sum_epilogue(const Policy& policy, const PairMasks<Team>& masks,
                                                 const PairPartials& partials, const Tile& tile,
                                                 const Team& team,
                                                 const typename Team::Values& values,
                                                 PairShared& shared) {
  constexpr int kRows = 2 * Team::kRowTiles, kColumns = 2 * Team::kColumnTiles;
  const auto logit = [&](int column, int row) {
    const float cosine = values.value[row / 2][column / 2][2 * (row % 2) + column % 2];
    return counted_logit<kPositive>(policy, computed_again(cosine), masks, column, row);
  };
  if (partials.columns.data != nullptr) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      // Branches also keep the compiler from working on everything at a time.
      if (!team.has_columns(c / 2, tile)) break;
      float logits[kRows], maximum = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int r = 0; r < kRows; ++r) maximum = fmaxf(maximum, logits[r] = logit(c, r));
      maximum = maximum_of_column(maximum);
      const float shift = shift_of(maximum);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum += expf(logits[r] - shift);
      sum = sum_of_column(sum);
      if (team.lane() < 4) {
        shared.columns.put(team.row_warp(), team.column(c / 2, c % 2), {maximum, sum});
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!team.has_strip(r / 2, tile)) break;
    float logits[kColumns], maximum = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) maximum = fmaxf(maximum, logits[c] = logit(c, r));
    maximum = maximum_of_row(maximum);
    const float shift = shift_of(maximum);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum += expf(logits[c] - shift);
    sum = sum_of_row(sum);
    if (team.lane() % 4 == 0) {
      shared.rows.put(team.column_warp(), team.row(r / 2, r % 2), {maximum, sum});
    }
  }
  team.wait();
  write_statistics<LogSums>(shared, partials, tile, team);
}

// Softplus and sigmoid of (log_negatives - z), summed over the positives of rows and columns.
template <class Policy, class Team>
__device__ __forceinline__ void positives_epilogue(const Policy& policy, const PairPositives& args,
                                                   const PairMasks<Team>& masks,
                                                   const PairPartials& partials, const Tile& tile,
                                                   const Team& team,
                                                   const typename Team::Values& values,
                                                   PairShared& shared) {
  constexpr int kRows = 2 * Team::kRowTiles, kColumns = 2 * Team::kColumnTiles;
  const bool both = partials.columns.data != nullptr;
  float losses[kRows] = {}, probs[kRows] = {};
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = team.column(c / 2, c % 2);
    float loss = 0.0f, prob = 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Positives are few.
      if (!masks.counts(c, r) || !masks.is_same(c, r)) continue;
      const float z = policy.positive(values.value[r / 2][c / 2][2 * (r % 2) + c % 2]).value;
      const int64_t i = tile.row() + team.row(r / 2, r % 2);
      const Softplus of_row = softplus(__ldg(args.a_log_negatives + i) - z);
      losses[r] += of_row.value;
      probs[r] += of_row.sigmoid;
      if (!both) continue;
      const Softplus of_column = softplus(__ldg(args.b_log_negatives + tile.column() + column) - z);
      loss += of_column.value;
      prob += of_column.sigmoid;
    }
    if (!both) continue;
    loss = sum_of_column(loss);
    prob = sum_of_column(prob);
    if (team.lane() < 4) shared.columns.put(team.row_warp(), column, {loss, prob});
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) losses[r] = sum_of_row(losses[r]);
  put_rows(shared.rows, team, losses, probs);
  team.wait();
  write_statistics<PlainSums>(shared, partials, tile, team);
}

struct PairGradientShared {
  TileLabels labels;
  PairSide rows[kTileRows], columns[kTileColumns];
};

template <bool kTwo, bool kBoth, class Team>
__device__ __forceinline__ void stage_sides(PairGradientShared& shared, const PairGradient& args,
                                            const Tile& tile, const Team& team) {
  for (int place = team.thread; place < kTileRows; place += Team::kThreads) {
    const int64_t i = tile.row() + place, j = tile.column() + place;
    PairSide row = {}, column = {};
    if (place < tile.rows) {
      row = {__ldg(args.a_log_negatives + i), __ldg(args.a_negative_weight + i),
             __ldg(args.a_positive_weight + i), kTwo ? __ldg(args.a_log_positives + i) : 0.0f};
    }
    if (kBoth && place < tile.columns) {
      column = {__ldg(args.b_log_negatives + j), __ldg(args.b_negative_weight + j),
                __ldg(args.b_positive_weight + j), kTwo ? __ldg(args.b_log_positives + j) : 0.0f};
    }
    shared_store(&shared.rows[place], row);
    shared_store(&shared.columns[place], column);
  }
}

template <bool kTwo, bool kBoth, class Policy, class Team, class Sink>
__device__ __forceinline__ void pair_gradient_epilogue(const Policy& policy,
                                                       const PairGradient& args, const Tile& tile,
                                                       const Team& team,
                                                       typename Team::Values& values,
                                                       const Sink& sink, unsigned char* memory) {
  PairGradientShared& shared = *reinterpret_cast<PairGradientShared*>(memory);
  sink.park(values);
  shared.labels.stage(args.a_labels, args.b_labels, tile, team);
  stage_sides<kTwo, kBoth>(shared, args, tile, team);
  team.wait();
  const PairMasks<Team> masks(shared.labels, args.diagonal, tile, team);
#pragma unroll
  for (int c = 0; c < Team::kColumnTiles; ++c) {
    sink.take(values, c);
#pragma unroll
    for (int strip = 0; strip < Team::kRowTiles; ++strip) {
      if (!team.has_strip(strip, tile)) break;
      forget_loads();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = 2 * c + k % 2, row = 2 * strip + k / 2;
        const PairSide of_row = shared_load(&shared.rows[team.row(strip, k / 2)]);
        const PairSide of_column = shared_load(&shared.columns[team.column(c, k % 2)]);
        const bool same = masks.is_same(column, row);
        float& value = values.value[strip][c][k];
        const float gradient = pair_gradient<kTwo, kBoth>(policy, value, same, of_row, of_column);
        const bool counted = masks.counts(column, row) && (Policy::kPositives || !same);
        // Selected, not multiplied: the cosine of an excluded pair may be NaN.
        value = counted ? gradient * args.gradient_scale : 0.0f;
      }
    }
    sink.put(values, c);
  }
}

}  // namespace unitsface::cuda
