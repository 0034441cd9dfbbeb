// Counts of a tile's cosines: by bins, or by sub-bins of a few ranges.
//
// A block takes 32 rows of 1024 columns, a thread every 256th of these. Almost all pairs are
// negative and crowd around one cosine: a block counts them in 16 bits each in shared memory, and
// adds these counts to the global counters once. Positives, and the pairs of per-row histograms and
// of ranges, are few or spread, and go to the global counters directly.

#include "common.cuh"
#include "kernels.h"
#include "unitsface/histogram_bin.h"

namespace unitsface::cuda {

constexpr int kBlockRows = 32;
constexpr int kItems = 4;  // columns per thread
constexpr int kSpan = kItems * kThreads;
constexpr int kSharedSlots = 24576;  // 48 KB, available on every device without opting in
static_assert(kBlockRows * kSpan < 1 << 16, "a block's count of one bin fits in 16 bits");

enum class Counting { kShared, kGlobal, kRanges };

__device__ __forceinline__ void count_one(int64_t* counter, unsigned long long count) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), count);
}

__device__ __forceinline__ void count_in_range(const HistogramTile& args, int64_t* counts,
                                               float score, int bin) {
  const int which = __ldg(args.range_of_bin + bin);
  if (which < 0) return;
  const ScoreRange range = args.ranges[which];
  const int64_t offset = score_key(score) - range.low;
  if (offset < 0 || offset >= range.size) return;
  count_one(counts + range.first + (offset >> range.shift), 1);
}

template <Counting kCounting>
__global__ void __launch_bounds__(kThreads)
    histogram_tile_kernel(const HistogramTile args, unsigned column_blocks) {
  __shared__ unsigned negatives[kCounting == Counting::kShared ? kSharedSlots / 2 : 1];
  const int words = static_cast<int>((args.slots + 1) / 2);
  if (kCounting == Counting::kShared) {
    for (int k = threadIdx.x; k < words; k += kThreads) negatives[k] = 0;
    __syncthreads();
  }
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / column_blocks) * kBlockRows;
  const int64_t end_row = min(args.n, first_row + kBlockRows);
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % column_blocks) * kSpan;
  const int bins = static_cast<int>(args.bins);

  int64_t labels[kItems];
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t j = first_column + k * kThreads + threadIdx.x;
    labels[k] = j < args.m ? __ldg(args.b_labels + j) : -1;
  }
  const bool some_left_out = args.diagonal != INT64_MIN;
  for (int64_t i = first_row; i < end_row; ++i) {
    const int64_t label = __ldg(args.a_labels + i);
    if (label < 0) continue;
    int64_t* counts = args.counts + (args.per_row ? i * 2 * args.slots : 0);
    const int64_t skipped = some_left_out ? i + args.diagonal : -1;
    float scores[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t j = first_column + k * kThreads + threadIdx.x;
      scores[k] = j < args.m ? __ldg(args.cosines + i * args.stride + j) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t j = first_column + k * kThreads + threadIdx.x;
      const bool left_out = some_left_out && (args.upper ? j <= skipped : j == skipped);
      if (labels[k] < 0 || left_out) continue;
      const int bin = score_bin(scores[k], args.low, args.scale, bins);
      const bool positive = labels[k] == label;
      int64_t* row = counts + (positive ? 0 : args.slots);
      if (kCounting == Counting::kRanges) {
        count_in_range(args, row, scores[k], bin);
      } else if (kCounting == Counting::kShared && !positive) {
        atomicAdd(negatives + bin / 2, bin % 2 ? 0x10000u : 1u);
      } else {
        count_one(row + bin, 1);
      }
    }
  }
  if (kCounting != Counting::kShared) return;
  __syncthreads();
  int64_t* total = args.counts + args.slots;
  for (int k = threadIdx.x; k < words; k += kThreads) {
    const unsigned pair = negatives[k];
    if (pair & 0xffffu) count_one(total + 2 * k, pair & 0xffffu);
    if (pair >> 16) count_one(total + 2 * k + 1, pair >> 16);
  }
}

void histogram_tile(const HistogramTile& args, void* stream) {
  if (args.n == 0 || args.m == 0) return;
  const int64_t column_blocks = divide_up(args.m, kSpan);
  const bool shared = !args.per_row && args.slots <= kSharedSlots;
  auto kernel = args.range_of_bin != nullptr ? histogram_tile_kernel<Counting::kRanges>
                : shared                     ? histogram_tile_kernel<Counting::kShared>
                                             : histogram_tile_kernel<Counting::kGlobal>;
  launch("histogram_tile", kernel, divide_up(args.n, kBlockRows) * column_blocks, 1, stream, args,
         static_cast<unsigned>(column_blocks));
}

}  // namespace unitsface::cuda
