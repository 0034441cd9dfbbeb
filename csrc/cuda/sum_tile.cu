// One tile of a `sum` loss: every pair's term, its gradient in place of its cosine, and sums of
// losses and threshold gradients over rows and columns.
//
// A block takes 128 columns of up to 256 rows, a warp four rows at a time. Sums leave a block as
// partials, one per row and one per column, which a second kernel adds up in a fixed order.

#include <algorithm>

#include "common.cuh"
#include "kernels.h"
#include "partials.h"
#include "policies.cuh"
#include "sum_terms.cuh"

namespace unitsface::cuda {

constexpr int kItems = 4;  // columns per lane
constexpr int kRows = 4;   // rows per warp and step
constexpr int kStepRows = kRows * kWarps;
constexpr int kSpan = kItems * kLanes;

// A function of the shape alone: results must not depend on the load of the device.
struct SumGrid {
  int64_t block_rows = 256, row_blocks, column_blocks;

  SumGrid(int64_t n, int64_t m) : column_blocks(divide_up(m, kSpan)) {
    // Several waves of blocks on a device of about 130 multiprocessors, if the tile is large
    // enough.
    while (block_rows > kStepRows && divide_up(n, block_rows) * column_blocks < 2048) {
      block_rows /= 2;
    }
    row_blocks = divide_up(n, block_rows);
  }
  int64_t blocks() const { return row_blocks * column_blocks; }
};

int64_t sum_tile_workspace(int64_t n, int64_t m) {
  const SumGrid grid(n, m);
  return 2 * (grid.column_blocks * n + grid.row_blocks * m);
}

template <class Policy, bool kSeparate, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    sum_tile_kernel(const Policy policy, const SumTile args, const SumPartials partials) {
  using Lane = Columns<kVector, kItems>;
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const unsigned row_block = blockIdx.x / partials.column_blocks;
  const unsigned column_block = blockIdx.x % partials.column_blocks;
  const int64_t first_row = row_block * partials.block_rows;
  const int64_t end_row = min(args.n, first_row + partials.block_rows);
  const int64_t first_column = static_cast<int64_t>(column_block) * kSpan;
  const int width = static_cast<int>(min(args.m - first_column, static_cast<int64_t>(kSpan)));

  int64_t labels[kItems];
  float thresholds[kItems], weights[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int column = Lane::first(lane) + Lane::offset(k);
    const int64_t j = first_column + column;
    const bool inside = column < width;
    labels[k] = inside ? __ldg(args.b_labels + j) : -1;
    thresholds[k] = inside ? __ldg(args.b_threshold + (args.per_column ? j : 0)) : 0.0f;
    weights[k] = inside && args.b_weights != nullptr ? __ldg(args.b_weights + j) : 1.0f;
  }
  const float mirror = args.mirrored ? 1.0f : 0.0f;
  const float other = args.b_loss != nullptr ? 1.0f : 0.0f;

  float column_loss[kItems] = {}, column_dthreshold[kItems] = {};
  for (int64_t row = first_row + warp * kRows; row < end_row; row += kStepRows) {
    // All loads before the first use. Past the end the last row is read again and not counted.
    float cosines[kRows][kItems] = {};
    int64_t row_labels[kRows];
    float row_weights[kRows], row_thresholds[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = min(row + r, end_row - 1);
      Lane::read(args.cosines + i * args.stride + first_column, lane, width, cosines[r]);
      row_labels[r] = __ldg(args.a_labels + i);
      row_weights[r] = args.a_weights != nullptr ? __ldg(args.a_weights + i) : 1.0f;
      row_thresholds[r] = kSeparate ? __ldg(args.a_threshold + i) : 0.0f;
      if (row + r >= end_row) row_labels[r] = -1;
    }
    float row_loss[kRows] = {}, row_dthreshold[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = row + r;
      // Unsigned: INT64_MIN wraps to far outside the span.
      const uint64_t excluded = static_cast<uint64_t>(i) + static_cast<uint64_t>(args.diagonal) -
                                static_cast<uint64_t>(first_column);
      const int left_out = excluded < kSpan ? static_cast<int>(excluded) - Lane::first(lane) : -1;
      float gradient[kItems];
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const bool counted = row_labels[r] >= 0 && labels[k] >= 0 && left_out != Lane::offset(k);
        const PairTerms terms = evaluate_pair<kSeparate>(
            policy, cosines[r][k], row_labels[r] == labels[k], thresholds[k], row_thresholds[r],
            {row_weights[r], mirror * weights[k], other * weights[k]});
        // Selected, not multiplied: the cosine of an excluded pair may be NaN.
        row_loss[r] += counted ? terms.row_loss : 0.0f;
        row_dthreshold[r] += counted ? terms.row_dthreshold : 0.0f;
        column_loss[k] += counted ? terms.column_loss : 0.0f;
        column_dthreshold[k] += counted ? terms.column_dthreshold : 0.0f;
        gradient[k] = counted ? terms.gradient * args.gradient_scale : 0.0f;
      }
      if (args.gradient != nullptr && i < end_row) {
        Lane::write(args.gradient, args.gradient_dtype, i * args.stride + first_column, lane, width,
                    gradient);
      }
    }
    const int64_t i = row + lane / 8;
    const bool writes = lane % 8 == 0 && i < end_row;
    const float loss = warp_sum_4(row_loss, lane);
    if (writes) partials.row_loss[column_block * args.n + i] = loss;
    if (kSeparate && partials.row_dthreshold != nullptr) {
      const float dthreshold = warp_sum_4(row_dthreshold, lane);
      if (writes) partials.row_dthreshold[column_block * args.n + i] = dthreshold;
    }
  }

  if (partials.column_loss == nullptr && partials.column_dthreshold == nullptr) return;
  __shared__ float sums[2][kWarps][kSpan];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int column = Lane::first(lane) + Lane::offset(k);
    sums[0][warp][column] = column_loss[k];
    sums[1][warp][column] = column_dthreshold[k];
  }
  __syncthreads();
  // The first half of the threads adds losses, the second half threshold gradients.
  static_assert(kThreads == 2 * kSpan, "one thread per column and sum");
  const int which = threadIdx.x / kSpan;
  const int column = threadIdx.x % kSpan;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += sums[which][w][column];
  const int64_t position = row_block * args.m + first_column + column;
  if (which == 0 && partials.column_loss != nullptr && column < width) {
    partials.column_loss[position] = sum;
  }
  if (partials.column_dthreshold == nullptr) return;
  if (args.per_column) {
    if (which == 1 && column < width) partials.column_dthreshold[position] = sum;
    return;
  }
  __shared__ float warps[kWarps];
  const float total = block_sum(which == 1 ? sum : 0.0f, warps);
  if (threadIdx.x == 0) partials.column_dthreshold[blockIdx.x] = total;
}

// out[i] += the sum of partial[k, i] over k < count, for i < length.
struct Addition {
  const float* partial;  // null: nothing to do
  float* out;
  int64_t length, count;
};

struct Additions {
  Addition row_loss, row_dthreshold, column_loss, column_dthreshold;
};

__global__ void __launch_bounds__(kThreads) add_partials_kernel(const Additions additions) {
  const Addition job = blockIdx.y == 0   ? additions.row_loss
                       : blockIdx.y == 1 ? additions.row_dthreshold
                       : blockIdx.y == 2 ? additions.column_loss
                                         : additions.column_dthreshold;
  if (job.partial == nullptr) return;
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  if (job.length == 1) {
    // The partials are contiguous: all threads take part, not one lane of each warp.
    __shared__ float warps[kWarps];
    if (blockIdx.x > 0) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t k = threadIdx.x; k < job.count; k += kThreads) sum += job.partial[k];
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) job.out[0] += sum;
    return;
  }
  __shared__ float sums[kWarps][kLanes];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  float sum = 0.0f;
  if (i < job.length) {
#pragma unroll 4
    for (int64_t k = warp; k < job.count; k += kWarps) sum += job.partial[k * job.length + i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || i >= job.length) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  job.out[i] += sum;
}

SumPartials sum_partials(const SumTile& args, float* workspace, int64_t column_blocks,
                         int64_t row_blocks, int64_t block_rows) {
  const bool both = args.b_loss != nullptr;
  SumPartials partials = {};
  partials.column_blocks = static_cast<unsigned>(column_blocks);
  partials.block_rows = block_rows;
  const int64_t row_count = column_blocks * args.n;
  partials.row_loss = workspace;
  if (args.per_column && both && args.a_dthreshold != nullptr && args.b_dthreshold != nullptr) {
    partials.row_dthreshold = workspace + row_count;
  }
  if (both) partials.column_loss = workspace + 2 * row_count;
  if (args.b_dthreshold != nullptr) {
    partials.column_dthreshold = workspace + 2 * row_count + row_blocks * args.m;
  }
  return partials;
}

void add_partials(const SumPartials& partials, const SumTile& args, int64_t column_blocks,
                  int64_t row_blocks, void* stream) {
  const int64_t thresholds = args.per_column ? args.m : 1;
  const Additions additions = {
      {partials.row_loss, args.a_loss, args.n, column_blocks},
      {partials.row_dthreshold, args.a_dthreshold, args.n, column_blocks},
      {partials.column_loss, args.b_loss, args.m, row_blocks},
      {partials.column_dthreshold, args.b_dthreshold, thresholds,
       args.per_column ? row_blocks : row_blocks * column_blocks},
  };
  const bool columns = args.b_loss != nullptr || args.per_column;
  const int64_t longest = columns ? std::max(args.n, args.m) : args.n;
  launch("sum_tile (partials)", add_partials_kernel, divide_up(longest, kLanes), 4, stream,
         additions);
}

template <class Policy>
void launch_sum_tile(const Policy& policy, const SumTile& args, float* workspace, void* stream) {
  if (args.n == 0 || args.m == 0) return;
  const SumGrid grid(args.n, args.m);
  const bool separate = separate_thresholds_of<Policy>(args);
  constexpr bool kRows = Policy::kRowThresholds;
  const SumPartials partials =
      sum_partials(args, workspace, grid.column_blocks, grid.row_blocks, grid.block_rows);

  const bool vector =
      vectorizable(args.cosines, args.gradient, args.gradient_dtype, args.m, args.stride);
  auto kernel =
      separate
          ? (vector ? sum_tile_kernel<Policy, kRows, true> : sum_tile_kernel<Policy, kRows, false>)
          : (vector ? sum_tile_kernel<Policy, false, true> : sum_tile_kernel<Policy, false, false>);
  launch("sum_tile", kernel, grid.blocks(), 1, stream, policy, args, partials);

  add_partials(partials, args, grid.column_blocks, grid.row_blocks, stream);
}

void sum_tile(const std::string& loss, const float* params, const SumTile& args, float* workspace,
              void* stream) {
  with_sum_policy(loss, params,
                  [&](const auto& policy) { launch_sum_tile(policy, args, workspace, stream); });
}

}  // namespace unitsface::cuda
