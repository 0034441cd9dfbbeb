// What follows the products of a `sum` loss whose rows are wanted as one total.
//
// Without a sum per row and per column, no result of a pair leaves its thread but the gradient, and
// softplus takes one logarithm for many pairs: sum log(1 + e) = log prod(1 + e). Ignored rows are
// computed like any other and left out at the end.
#pragma once

#include "../kernels.h"
#include "accumulator.cuh"
#include "unitsface/scalar_math.h"

namespace unitsface::cuda {

// e^-|x| and sign / (1 + e^-x) for a sign of 1 or -1, accurate relative to themselves.
struct Softplus2 {
  float exponential, sigmoid;
};

__device__ __forceinline__ Softplus2 softplus_parts(float x, float sign) {
  const float e = exp2_approximate(fabsf(x) * -1.44269504f);
  const float share = divide_by_unit(1.0f, fmaf(e, sign, sign));
  return {e, x > 0.0f ? share : e * share};
}

// Columns of a tile, in shared memory.
struct SoftplusShared {
  int64_t labels[kTileColumns];
};

template <class Team>
__device__ __forceinline__ void read_columns(SoftplusShared& shared, const SumTile& args,
                                             const Tile& tile, const Team& team) {
  for (int place = team.thread; place < kTileColumns; place += Team::kThreads) {
    shared_store(&shared.labels[place],
                 place < tile.columns ? __ldg(args.b_labels + tile.column() + place) : int64_t(-1));
  }
}

// Sums of a thread, over any number of tiles.
struct Totals {
  float loss = 0.0f, dthreshold = 0.0f;
};

// Rows ignored or past the end are computed like others, without what may not be a number.
template <class Team>
__device__ __forceinline__ void clear_row(typename Team::Values& values, int r) {
#pragma unroll
  for (int c = 0; c < Team::kColumnTiles; ++c) {
    values.value[r / 2][c][2 * (r % 2)] = values.value[r / 2][c][2 * (r % 2) + 1] = 0.0f;
  }
}

// `values`: cosines, afterwards the gradient. read_columns and a barrier are before it. The slope
// of the logit must be the same for all pairs (kUniformSlope): that of a pair left out is
// multiplied.
template <class Policy, class Team>
__device__ __forceinline__ void softplus_epilogue(const Policy& policy, const SumTile& args,
                                                  float threshold, const Tile& tile,
                                                  const Team& team, typename Team::Values& values,
                                                  const SoftplusShared& shared, Totals& totals) {
  static_assert(Policy::kUniformSlope, "a finite slope for any cosine");
  constexpr int kRows = 2 * Team::kRowTiles;
  // With fewer rows at a time, columns are read more often, and fewer registers are needed.
  constexpr int kTogether = Policy::kWeighted ? kRows / 2 : kRows;
  constexpr int kProducts = Policy::kWeighted ? 2 : 1;
  // Columns after which a branch keeps the compiler from working on all of them at a time, which
  // would take more registers than there are.
  constexpr int kPart = 4;
  static_assert(2 * Team::kColumnTiles <= 64, "a product has as many factors of at most 2");
  const int shift = diagonal_shift(tile, args.diagonal);
  const float factor = (args.mirrored ? 2.0f : 1.0f) * args.gradient_scale;
  const float directions = args.b_loss != nullptr ? 2.0f : 1.0f;
#pragma unroll
  for (int first = 0; first < kRows; first += kTogether) {
    int64_t labels[kTogether];
    float factors[kTogether], tops[kTogether], slopes[kTogether], products[kProducts][kTogether];
    int left_out[kTogether];  // column
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int r = first + k, row = team.row(r / 2, r % 2);
      labels[k] = row < tile.rows ? __ldg(args.a_labels + tile.row() + row) : -1;
      factors[k] = labels[k] >= 0 ? factor : 0.0f;
      left_out[k] = row + shift - team.column(0, 0);
      tops[k] = slopes[k] = 0.0f;
      for (int p = 0; p < kProducts; ++p) products[p][k] = 0.0f;
      if (labels[k] < 0) clear_row<Team>(values, r);
    }
#pragma unroll
    for (int c = 0; c < Team::kColumnTiles; ++c) {
      if (c % kPart == 0 && 8 * c >= tile.columns) break;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int64_t label = shared_load(&shared.labels[team.column(c, which)]);
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          const int r = first + k;
          float& value = values.value[r / 2][c][2 * (r % 2) + which];
          const bool positive = labels[k] == label;
          const Logit logit = policy.logit(value, threshold, positive);
          // Selected: the cosine of a pair that is left out may be NaN.
          const bool counted = label >= 0 && left_out[k] != 8 * c + which;
          const float z = counted ? (positive ? -logit.value : logit.value) : -INFINITY;
          Softplus2 parts = softplus_parts(z, positive ? -1.0f : 1.0f);
          float top = fmaxf(z, 0.0f);
          if constexpr (Policy::kWeighted) {
            const float weight = policy.weight(positive);
            top *= weight;
            parts.sigmoid *= weight;
            const float of_positive = positive ? parts.exponential : 0.0f;
            products[1][k] = fmaf(products[1][k], of_positive, products[1][k] + of_positive);
            parts.exponential = positive ? 0.0f : parts.exponential;
          }
          const float e = parts.exponential;
          products[0][k] = fmaf(products[0][k], e, products[0][k] + e);
          tops[k] += top;
          slopes[k] += parts.sigmoid;
          value = parts.sigmoid * (logit.dcosine * factors[k]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      float log = log1pf(products[0][k]);
      if constexpr (Policy::kWeighted) {
        log = policy.weight(false) * log + policy.weight(true) * log1pf(products[1][k]);
      }
      const bool counted = labels[k] >= 0;
      totals.loss += counted ? directions * (tops[k] + log) : 0.0f;
      totals.dthreshold += counted ? directions * Policy::kThresholdSlope * slopes[k] : 0.0f;
    }
  }
}

}  // namespace unitsface::cuda
