// What follows the products of a `sum` loss whose rows are wanted as one total, without weights and
// with one threshold: no result of a pair leaves its lane but the gradient.
#pragma once

#include "../kernels.h"
#include "pair_masks.cuh"

namespace unitsface::cuda {

struct TotalShared {
  TileLabels labels;
  float sums[2][kTileRows / 16];
};

// Adds the loss of the tile's pairs to args.a_loss[place], and the threshold's gradient to
// args.b_dthreshold[place] if it is wanted: a pair that counts in both directions counts twice.
template <class Policy, class Team, class Sink>
__device__ __forceinline__ void total_epilogue(const Policy& policy, const SumTile& args,
                                               const Tile& tile, const Team& team,
                                               typename Team::Values& values, const Sink& sink,
                                               unsigned place, unsigned char* memory) {
  TotalShared& shared = *reinterpret_cast<TotalShared*>(memory);
  sink.park(values);
  shared.labels.stage(args.a_labels, args.b_labels, tile, team);
  const float threshold = __ldg(args.b_threshold);
  team.wait();
  const PairMasks<Team> masks(shared.labels, args.diagonal, tile, team);
  const float scale = args.gradient_scale * (args.mirrored ? 2.0f : 1.0f);
  float loss = 0.0f, dthreshold = 0.0f;
#pragma unroll
  for (int c = 0; c < Team::kColumnTiles; ++c) {
    sink.take(values, c);
#pragma unroll
    for (int strip = 0; strip < Team::kRowTiles; ++strip) {
      if (!team.has_strip(strip, tile)) break;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = 2 * c + k % 2, row = 2 * strip + k / 2;
        float& value = values.value[strip][c][k];
        const Term term = policy.evaluate(value, threshold, masks.is_same(column, row));
        const bool counted = masks.counts(column, row);
        // Selected, not multiplied: the cosine of an excluded pair may be NaN.
        loss += counted ? term.value : 0.0f;
        dthreshold += counted ? term.dthreshold : 0.0f;
        value = counted ? term.dcosine * scale : 0.0f;
      }
    }
    sink.put(values, c);
  }
  const int warp = team.thread / kLanes;
  loss = warp_sum(loss);
  dthreshold = warp_sum(dthreshold);
  if (team.lane() == 0) {
    shared_store(&shared.sums[0][warp], loss);
    shared_store(&shared.sums[1][warp], dthreshold);
  }
  team.wait();
  const bool wanted = team.thread == 0 || (team.thread == 1 && args.b_dthreshold != nullptr);
  if (!wanted) return;
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < Team::kThreads / kLanes; ++k) {
    total += shared_load(&shared.sums[team.thread][k]);
  }
  // Launches follow one another: the order of the additions is fixed.
  (team.thread == 0 ? args.a_loss : args.b_dthreshold)[place] +=
      total * (args.b_loss != nullptr ? 2.0f : 1.0f);
}

}  // namespace unitsface::cuda
