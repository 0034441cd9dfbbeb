// What follows the products of a `logsumexp` loss over classes: the negatives' maximum and sum of
// each row of the tile, or the gradient.
#pragma once

#include "log_sum_strips.cuh"

namespace unitsface::cuda {

// The target's column in the tile, beyond it if it is in another one.
__device__ __forceinline__ int target_in_tile(const int64_t* targets, int64_t start,
                                              const Tile& tile, int row) {
  if (row >= tile.rows) return kTileColumns;
  const int64_t target = __ldg(targets + tile.row() + row) - start - tile.column();
  return target >= 0 && target < tile.columns ? static_cast<int>(target) : kTileColumns;
}

template <class Policy, class Team>
__device__ __forceinline__ void logsumexp_epilogue(const Policy& policy,
                                                   const LogsumexpTileArgs& args,
                                                   const Partials& partials, const Tile& tile,
                                                   const Team& team, typename Team::Values& values,
                                                   unsigned char* memory) {
  constexpr int kRows = 2 * Team::kRowTiles;
  StripStatistics& shared = *reinterpret_cast<StripStatistics*>(memory);
  float maxima[kRows], sums[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = team.row(r / 2, r % 2);
    const int target = target_in_tile(args.targets, args.start, tile, row);
    maxima[r] = -INFINITY;
#pragma unroll
    for (int k = 0; k < 2 * Team::kColumnTiles; ++k) {
      const int column = team.column(k / 2, k % 2);
      float& value = values.value[r / 2][k / 2][2 * (r % 2) + k % 2];
      if (column == target) args.target_cosine[tile.row() + row] = value;
      const float z = policy.negative(value).value;
      value = column < tile.columns && column != target ? z : -INFINITY;
      maxima[r] = fmaxf(maxima[r], value);
    }
    maxima[r] = maximum_of_row(maxima[r]);
    const float shift = shift_of(maxima[r]);
#pragma unroll
    for (int k = 0; k < 2 * Team::kColumnTiles; ++k) {
      sums[r] += expf(values.value[r / 2][k / 2][2 * (r % 2) + k % 2] - shift);
    }
  }
  put_rows(shared, team, maxima, sums);
  team.wait();
  shared.write<LogSums>(partials, tile.column_block, tile.row(), tile.rows, Team::kColumnWarps,
                        team);
}

// What the gradients of a row's pairs read.
struct alignas(16) ClassRow {
  float log_negatives, negative_weight, target_gradient;
  int target;
};

template <class Policy, class Team, class Sink>
__device__ __forceinline__ void logsumexp_gradient_epilogue(
    const Policy& policy, const LogsumexpGradientArgs& args, const Tile& tile, const Team& team,
    typename Team::Values& values, const Sink& sink, unsigned char* memory) {
  ClassRow* rows = reinterpret_cast<ClassRow*>(memory);
  sink.park(values);
  for (int row = team.thread; row < kTileRows; row += Team::kThreads) {
    ClassRow own = {0.0f, 0.0f, 0.0f, target_in_tile(args.targets, args.start, tile, row)};
    if (row < tile.rows) {
      own.log_negatives = __ldg(args.log_negatives + tile.row() + row);
      own.negative_weight = __ldg(args.negative_weight + tile.row() + row);
      own.target_gradient = __ldg(args.target_gradient + tile.row() + row);
    }
    shared_store(&rows[row], own);
  }
  team.wait();
#pragma unroll
  for (int c = 0; c < Team::kColumnTiles; ++c) {
    sink.take(values, c);
#pragma unroll
    for (int strip = 0; strip < Team::kRowTiles; ++strip) {
      if (!team.has_strip(strip, tile)) break;
      forget_loads();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const ClassRow row = shared_load(&rows[team.row(strip, k / 2)]);
        float& value = values.value[strip][c][k];
        const Logit z = policy.negative(value);
        const float negative = row.negative_weight * expf(z.value - row.log_negatives) * z.dcosine;
        const bool is_target = team.column(c, k % 2) == row.target;
        // A row without weight has a gradient of 0 for any cosines, NaN included.
        value = row.negative_weight != 0.0f
                    ? (is_target ? row.target_gradient : negative) * args.gradient_scale
                    : 0.0f;
      }
    }
    sink.put(values, c);
  }
}

}  // namespace unitsface::cuda
