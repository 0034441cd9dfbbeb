// What follows the products of a loss of log-sum-exps over samples, for teams of LaneRows: maxima
// and sums of the negatives of the tile's rows and columns, and of the positives.
#pragma once

#include "epilogue_pairs_sm90.cuh"

namespace unitsface::cuda {

// Shared memory. kKinds: negatives alone, or the two.
template <int kKinds>
struct LogSumsShared {
  StripStatistics columns[kKinds];
  int64_t labels[kTileColumns];
};

// Maxima and sums of either kind of pairs.
template <int kKinds>
struct KindSums {
  float maxima[kKinds], shifts[kKinds], sums[kKinds];

  __device__ __forceinline__ KindSums() {
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) maxima[kind] = -INFINITY, sums[kind] = 0.0f;
  }

  // Without kinds to tell apart, all pairs are negatives.
  static __device__ __forceinline__ bool is(int kind, bool positive) {
    return kKinds == 1 || positive == (kind == 1);
  }
  __device__ __forceinline__ void compare(float z, bool positive) {
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) {
      maxima[kind] = fmaxf(maxima[kind], is(kind, positive) ? z : -INFINITY);
    }
  }
  __device__ __forceinline__ void shift() {
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) shifts[kind] = kLog2E * shift_of(maxima[kind]);
  }
  // One exponential serves both.
  __device__ __forceinline__ void add(float z, bool positive) {
    const float shift = kKinds > 1 && positive ? shifts[kKinds - 1] : shifts[0];
    const float e = exp2_approximate(fmaf(z, kLog2E, -shift));
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) sums[kind] += is(kind, positive) ? e : 0.0f;
  }
  // The sums, of another maximum before.
  __device__ __forceinline__ void move(const KindSums& before) {
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) {
      sums[kind] *= exp2_approximate(fmaf(before.maxima[kind], kLog2E, -shifts[kind]));
    }
  }
};

// kTwo: of the negatives and of the positives. All threads of the team call; `memory` has
// sizeof(LogSumsShared<kTwo ? 2 : 1>), aligned to 16 bytes.
template <bool kTwo, bool kBoth, class Policy, class Team>
__device__ __forceinline__ void strip_log_sums(const Policy& policy, const PairNegatives& args,
                                               const Partials* of_rows, const Partials* of_columns,
                                               const Tile& tile, const Team& team,
                                               const typename Team::Values& values,
                                               unsigned char* memory) {
  constexpr int kKinds = kTwo ? 2 : 1, kColumns = 2 * kStripTiles;
  using Sums = KindSums<kKinds>;
  LogSumsShared<kKinds>& shared = *reinterpret_cast<LogSumsShared<kKinds>*>(memory);
  stage_labels(shared.labels, args.b_labels, tile, team);
  const LaneRows<Team> rows(args.a_labels, args.diagonal, tile, team);
  Sums sums[rows.kCount];
  team.wait();
#pragma unroll
  for (int first = 0; first < Team::kColumnTiles; first += kStripTiles) {
    if (8 * first >= tile.columns) break;
    bool positive[kColumns][rows.kCount];
    float logits[kColumns][rows.kCount];
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int c = first + k / 2, which = k % 2, column = team.column(c, which);
      const int64_t label = shared_load(&shared.labels[column]);
      Sums of_column;
#pragma unroll
      for (int r = 0; r < rows.kCount; ++r) {
        const bool same = rows.labels[r] == label;
        const float cosine = value_of(values, r, c, which);
        const float z =
            kTwo ? pair_logit(policy, cosine, same).value : policy.negative(cosine).value;
        const bool counted = rows.counts(r, c, which, label) && (kTwo || !same);
        // Selected: the cosine of an excluded pair may be NaN.
        logits[k][r] = counted ? z : -INFINITY;
        positive[k][r] = same;
        of_column.compare(logits[k][r], same);
      }
      if constexpr (kBoth) {
#pragma unroll
        for (float& maximum : of_column.maxima) maximum = maximum_of_column(maximum);
        of_column.shift();
#pragma unroll
        for (int r = 0; r < rows.kCount; ++r) of_column.add(logits[k][r], positive[k][r]);
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind) {
          const Statistic result = {of_column.maxima[kind], sum_of_column(of_column.sums[kind])};
          if (team.lane() < 4) shared.columns[kind].put(team.row_warp(), column, result);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < rows.kCount; ++r) {
      const Sums before = sums[r];
#pragma unroll
      for (int k = 0; k < kColumns; ++k) sums[r].compare(logits[k][r], positive[k][r]);
      sums[r].shift();
      sums[r].move(before);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) sums[r].add(logits[k][r], positive[k][r]);
    }
  }
#pragma unroll
  for (int r = 0; r < rows.kCount; ++r) {
    const int row = team.row(r / 2, r % 2);
    const Sums before = sums[r];
#pragma unroll
    for (float& maximum : sums[r].maxima) maximum = maximum_of_row(maximum);
    sums[r].shift();
    sums[r].move(before);
#pragma unroll
    for (int kind = 0; kind < kKinds; ++kind) {
      const Statistic result = {sums[r].maxima[kind], sum_of_row(sums[r].sums[kind])};
      if (team.lane() % 4 != 0 || row >= tile.rows) continue;
      of_rows[kind].write(tile.column_block, tile.row() + row, result);
    }
  }
  if (!kBoth) return;
  if (!planted(42)) team.wait();
#pragma unroll
  for (int kind = 0; kind < kKinds; ++kind) {
    shared.columns[kind].template write<LogSums>(of_columns[kind], tile.row_block, tile.column(),
                                                 tile.columns, Team::kRowWarps, team);
  }
}

}  // namespace unitsface::cuda
