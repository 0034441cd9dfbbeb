// Tiles of log-sum-exp losses over samples: any number of positives per row. For losses that have a
// log-sum-exp of positives as well, the kernels of the statistics run once more with kPositive.
//
// Statistics of rows: a warp takes 1024 columns of a row. Statistics of columns, where the tile
// serves both directions: a thread takes 32 rows of a column, which coalesces the loads.
// Both leave partials, which a further kernel folds into the running values in a fixed order.

#include "common.cuh"
#include "kernels.h"
#include "pair_kind.cuh"
#include "partials.h"
#include "policies.cuh"

namespace unitsface::cuda {

constexpr int kItems = 32;  // columns per lane
constexpr int kSpan = kItems * kLanes;
constexpr int kDepth = 32;  // rows per thread
constexpr int kGradientItems = 4, kGradientRows = 4;
constexpr int kGradientSpan = kGradientItems * kLanes, kGradientBlockRows = 64;

int64_t pair_statistics_workspace(int64_t n, int64_t m) {
  return 2 * (divide_up(m, kSpan) * n + divide_up(n, kDepth) * m);
}

// Position of a warp: eight rows of one span per block.
struct RowPlace {
  int64_t row, first_column;
  unsigned segment;
  int width, skipped;  // columns of the span; the excluded one among them, or negative
};

__device__ __forceinline__ RowPlace row_place(int64_t m, int64_t diagonal, int64_t segments) {
  RowPlace place;
  place.segment = blockIdx.x % static_cast<unsigned>(segments);
  place.row = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(segments)) * kWarps +
              threadIdx.x / kLanes;
  place.first_column = static_cast<int64_t>(place.segment) * kSpan;
  place.width = static_cast<int>(min(m - place.first_column, static_cast<int64_t>(kSpan)));
  // Unsigned: INT64_MIN wraps to far outside the span.
  const uint64_t excluded = static_cast<uint64_t>(place.row) + static_cast<uint64_t>(diagonal) -
                            static_cast<uint64_t>(place.first_column);
  place.skipped = excluded < kSpan ? static_cast<int>(excluded) : -kSpan;
  return place;
}

// Position of a thread: 32 rows of one column.
struct ColumnPlace {
  int64_t column, first_row, segment;
  int height, skipped;
};

__device__ __forceinline__ ColumnPlace column_place(int64_t n, int64_t m, int64_t diagonal) {
  ColumnPlace place;
  const unsigned blocks = static_cast<unsigned>(divide_up(m, kThreads));
  place.segment = blockIdx.x / blocks;
  place.column = static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  place.first_row = place.segment * kDepth;
  place.height = static_cast<int>(min(n - place.first_row, static_cast<int64_t>(kDepth)));
  const uint64_t excluded = static_cast<uint64_t>(place.column) - static_cast<uint64_t>(diagonal) -
                            static_cast<uint64_t>(place.first_row);
  place.skipped = excluded < kDepth ? static_cast<int>(excluded) : -1;
  return place;
}

template <class Policy, bool kPositive, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    pair_negatives_rows_kernel(const Policy policy, const PairNegatives args,
                               const Partials partials) {
  using Lane = Columns<kVector, kItems>;
  const int lane = threadIdx.x % kLanes;
  const RowPlace place = row_place(args.m, args.diagonal, partials.segments);
  if (place.row >= args.n) return;
  const int64_t label = __ldg(args.a_labels + place.row);
  const int64_t* labels = args.b_labels + place.first_column + Lane::first(lane);
  const int width = place.width - Lane::first(lane);
  const int skipped = place.skipped - Lane::first(lane);
  float logits[kItems] = {};
  Lane::read(args.cosines + place.row * args.stride + place.first_column, lane, place.width,
             logits);
  float maximum = -INFINITY;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const int64_t other = Lane::offset(k) < width ? __ldg(labels + Lane::offset(k)) : -1;
    const bool counted = is_of_kind<kPositive>(label, other) && Lane::offset(k) != skipped;
    const float z = logit_of_kind<kPositive>(policy, logits[k]);
    // Selected: the cosine of an excluded pair may be NaN.
    logits[k] = counted ? z : -INFINITY;
    maximum = fmaxf(maximum, logits[k]);
  }
  maximum = warp_max(maximum);
  const float shift = shift_of(maximum);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kItems; ++k) sum += expf(logits[k] - shift);
  sum = warp_sum(sum);
  if (lane == 0) partials.write(place.segment, place.row, {maximum, sum});
}

template <class Policy, bool kPositive>
__global__ void __launch_bounds__(kThreads, 2)
    pair_negatives_columns_kernel(const Policy policy, const PairNegatives args,
                                  const Partials partials) {
  const ColumnPlace place = column_place(args.n, args.m, args.diagonal);
  if (place.column >= args.m) return;
  const int64_t label = __ldg(args.b_labels + place.column);
  const float* column = args.cosines + place.first_row * args.stride + place.column;
  float logits[kDepth];
  float maximum = -INFINITY;
#pragma unroll
  for (int r = 0; r < kDepth; ++r) {
    // Past the end the last row is read again and not counted.
    const int row = min(r, place.height - 1);
    const int64_t other = __ldg(args.a_labels + place.first_row + row);
    const bool counted =
        is_of_kind<kPositive>(label, other) && r < place.height && r != place.skipped;
    const float z = logit_of_kind<kPositive>(policy, column[row * args.stride]);
    logits[r] = counted ? z : -INFINITY;
    maximum = fmaxf(maximum, logits[r]);
  }
  const float shift = shift_of(maximum);
  float sum = 0.0f;
#pragma unroll
  for (int r = 0; r < kDepth; ++r) sum += expf(logits[r] - shift);
  partials.write(place.segment, place.column, {maximum, sum});
}

// Positives are few: of most pairs only the labels are read.
template <class Policy>
__global__ void __launch_bounds__(kThreads)
    pair_positives_rows_kernel(const Policy policy, const PairPositives args,
                               const Partials partials) {
  const int lane = threadIdx.x % kLanes;
  const RowPlace place = row_place(args.m, args.diagonal, partials.segments);
  if (place.row >= args.n) return;
  const int64_t label = __ldg(args.a_labels + place.row);
  const float log_negatives = __ldg(args.a_log_negatives + place.row);
  const float* row = args.cosines + place.row * args.stride + place.first_column;
  const int width = label >= 0 ? place.width : 0;
  float loss = 0.0f, negative_prob = 0.0f;
#pragma unroll 8
  for (int column = lane; column < width; column += kLanes) {
    if (__ldg(args.b_labels + place.first_column + column) != label) continue;
    if (column == place.skipped) continue;
    const Softplus term = softplus(log_negatives - policy.positive(row[column]).value);
    loss += term.value;
    negative_prob += term.sigmoid;
  }
  loss = warp_sum(loss);
  negative_prob = warp_sum(negative_prob);
  if (lane == 0) partials.write(place.segment, place.row, {loss, negative_prob});
}

template <class Policy>
__global__ void __launch_bounds__(kThreads)
    pair_positives_columns_kernel(const Policy policy, const PairPositives args,
                                  const Partials partials) {
  const ColumnPlace place = column_place(args.n, args.m, args.diagonal);
  if (place.column >= args.m) return;
  const int64_t label = __ldg(args.b_labels + place.column);
  const float log_negatives = __ldg(args.b_log_negatives + place.column);
  const float* column = args.cosines + place.first_row * args.stride + place.column;
  const int height = label >= 0 ? place.height : 0;
  float loss = 0.0f, negative_prob = 0.0f;
#pragma unroll 8
  for (int r = 0; r < height; ++r) {
    if (__ldg(args.a_labels + place.first_row + r) != label || r == place.skipped) continue;
    const Softplus term = softplus(log_negatives - policy.positive(column[r * args.stride]).value);
    loss += term.value;
    negative_prob += term.sigmoid;
  }
  partials.write(place.segment, place.column, {loss, negative_prob});
}

// A block serves 32 rows or columns; its warps share the segments.
template <class Fold>
__global__ void __launch_bounds__(kThreads)
    fold_partials_kernel(const Partials partials, float* first, float* second) {
  __shared__ float firsts[kWarps][kLanes], seconds[kWarps][kLanes];
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  Statistic result = Fold::none();
  if (position < partials.length) {
    for (int64_t k = warp; k < partials.segments; k += kWarps) {
      result = Fold::fold(result, partials.read(k, position));
    }
  }
  firsts[warp][lane] = result.first;
  seconds[warp][lane] = result.second;
  __syncthreads();
  if (warp > 0 || position >= partials.length) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    result = Fold::fold(result, {firsts[w][lane], seconds[w][lane]});
  }
  result = Fold::fold({first[position], second[position]}, result);
  first[position] = result.first;
  second[position] = result.second;
}

// A block takes 128 columns of 64 rows, a warp four rows at a time: the columns' values are
// read once.
template <class Policy, bool kTwo, bool kBoth, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    pair_gradient_kernel(const Policy policy, const PairGradient args, unsigned column_blocks) {
  using Lane = Columns<kVector, kGradientItems>;
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / column_blocks) * kGradientBlockRows;
  const int64_t end_row = min(args.n, first_row + kGradientBlockRows);
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % column_blocks) * kGradientSpan;
  const int width =
      static_cast<int>(min(args.m - first_column, static_cast<int64_t>(kGradientSpan)));

  int64_t labels[kGradientItems];
  PairSide columns[kGradientItems] = {};
#pragma unroll
  for (int k = 0; k < kGradientItems; ++k) {
    const int column = Lane::first(lane) + Lane::offset(k);
    const int64_t j = first_column + column;
    labels[k] = column < width ? __ldg(args.b_labels + j) : -1;
    if (kBoth && column < width) {
      columns[k] = {__ldg(args.b_log_negatives + j), __ldg(args.b_negative_weight + j),
                    __ldg(args.b_positive_weight + j),
                    kTwo ? __ldg(args.b_log_positives + j) : 0.0f};
    }
  }
  for (int64_t row = first_row + warp * kGradientRows; row < end_row;
       row += kGradientRows * kWarps) {
    // All loads before the first use. Past the end the last row is read again and not written.
    float cosines[kGradientRows][kGradientItems] = {};
#pragma unroll
    for (int r = 0; r < kGradientRows; ++r) {
      const int64_t i = min(row + r, end_row - 1);
      Lane::read(args.cosines + i * args.stride + first_column, lane, width, cosines[r]);
    }
#pragma unroll
    for (int r = 0; r < kGradientRows; ++r) {
      const int64_t i = row + r;
      if (i >= end_row) break;
      const int64_t label = __ldg(args.a_labels + i);
      const PairSide side = {__ldg(args.a_log_negatives + i), __ldg(args.a_negative_weight + i),
                             __ldg(args.a_positive_weight + i),
                             kTwo ? __ldg(args.a_log_positives + i) : 0.0f};
      const uint64_t excluded = static_cast<uint64_t>(i) + static_cast<uint64_t>(args.diagonal) -
                                static_cast<uint64_t>(first_column);
      const int skipped =
          excluded < kGradientSpan ? static_cast<int>(excluded) - Lane::first(lane) : -1;
      float gradient[kGradientItems];
#pragma unroll
      for (int k = 0; k < kGradientItems; ++k) {
        const bool same = labels[k] == label;
        const float slope =
            pair_gradient<kTwo, kBoth>(policy, cosines[r][k], same, side, columns[k]);
        const bool counted = label >= 0 && labels[k] >= 0 && skipped != Lane::offset(k) &&
                             (Policy::kPositives || !same);
        // Selected, not multiplied: the cosine of an excluded pair may be NaN.
        gradient[k] = counted ? slope * args.gradient_scale : 0.0f;
      }
      Lane::write(args.gradient, args.gradient_dtype, i * args.stride + first_column, lane, width,
                  gradient);
    }
  }
}

struct Directions {
  Partials rows, columns;

  Directions(int64_t n, int64_t m, float* workspace)
      : rows{workspace, divide_up(m, kSpan), n},
        columns{workspace + 2 * rows.segments * n, divide_up(n, kDepth), m} {}
  int64_t row_blocks() const { return divide_up(rows.length, kWarps) * rows.segments; }
  int64_t column_blocks() const { return divide_up(columns.length, kThreads) * columns.segments; }
};

template <class Fold>
void fold_partials(const Partials& partials, float* first, float* second, void* stream) {
  launch("pair tile (fold)", fold_partials_kernel<Fold>, divide_up(partials.length, kLanes), 1,
         stream, partials, first, second);
}
template void fold_partials<LogSums>(const Partials&, float*, float*, void*);
template void fold_partials<PlainSums>(const Partials&, float*, float*, void*);

// Running values of a log-sum-exp; those of the columns may be null.
struct Running {
  float *a_maximum, *a_total, *b_maximum, *b_total;
};

template <bool kPositive, class Policy>
void launch_statistics(const Policy& policy, const PairNegatives& args, const Running& running,
                       float* workspace, void* stream) {
  const Directions to(args.n, args.m, workspace);
  const bool vector = vectorizable(args.cosines, nullptr, DType::kFloat32, args.m, args.stride);
  launch("pair_negatives_tile",
         vector ? pair_negatives_rows_kernel<Policy, kPositive, true>
                : pair_negatives_rows_kernel<Policy, kPositive, false>,
         to.row_blocks(), 1, stream, policy, args, to.rows);
  fold_partials<LogSums>(to.rows, running.a_maximum, running.a_total, stream);
  if (running.b_maximum == nullptr) return;
  launch("pair_negatives_tile (columns)", pair_negatives_columns_kernel<Policy, kPositive>,
         to.column_blocks(), 1, stream, policy, args, to.columns);
  fold_partials<LogSums>(to.columns, running.b_maximum, running.b_total, stream);
}

template <bool kTwo, class Policy>
void launch_pair_negatives(const Policy& policy, const PairNegatives& args, float* workspace,
                           void* stream) {
  if (kTwo) require_positives(args);
  if (args.n == 0 || args.m == 0) return;
  const Running negatives{args.a_maximum, args.a_total, args.b_maximum, args.b_total};
  launch_statistics<false>(policy, args, negatives, workspace, stream);
  if constexpr (kTwo && Policy::kPositives) {
    const Running positives{args.a_positive_maximum, args.a_positive_total, args.b_positive_maximum,
                            args.b_positive_total};
    launch_statistics<true>(policy, args, positives, workspace, stream);
  }
}

template <class Policy>
void launch_pair_positives(const Policy& policy, const PairPositives& args, float* workspace,
                           void* stream) {
  if constexpr (Policy::kPositives) {
    if (args.n == 0 || args.m == 0) return;
    const Directions to(args.n, args.m, workspace);
    launch("pair_positives_tile", pair_positives_rows_kernel<Policy>, to.row_blocks(), 1, stream,
           policy, args, to.rows);
    fold_partials<PlainSums>(to.rows, args.a_loss, args.a_negative_prob, stream);
    if (args.b_loss == nullptr) return;
    launch("pair_positives_tile (columns)", pair_positives_columns_kernel<Policy>,
           to.column_blocks(), 1, stream, policy, args, to.columns);
    fold_partials<PlainSums>(to.columns, args.b_loss, args.b_negative_prob, stream);
  }
}

template <bool kTwo, class Policy>
void launch_pair_gradient(const Policy& policy, const PairGradient& args, void* stream) {
  if (kTwo) require_positives(args);
  if (args.n == 0 || args.m == 0) return;
  const int64_t column_blocks = divide_up(args.m, kGradientSpan);
  const bool vector =
      vectorizable(args.cosines, args.gradient, args.gradient_dtype, args.m, args.stride);
  auto kernel = args.b_log_negatives != nullptr
                    ? (vector ? pair_gradient_kernel<Policy, kTwo, true, true>
                              : pair_gradient_kernel<Policy, kTwo, true, false>)
                    : (vector ? pair_gradient_kernel<Policy, kTwo, false, true>
                              : pair_gradient_kernel<Policy, kTwo, false, false>);
  launch("pair_gradient_tile", kernel, divide_up(args.n, kGradientBlockRows) * column_blocks, 1,
         stream, policy, args, static_cast<unsigned>(column_blocks));
}

void pair_negatives_tile(const std::string& loss, const float* params, const PairNegatives& args,
                         float* workspace, void* stream) {
  with_pair_policy(loss, params, [&](const auto& p, auto two) {
    launch_pair_negatives<two>(p, args, workspace, stream);
  });
}

void pair_positives_tile(const std::string& loss, const float* params, const PairPositives& args,
                         float* workspace, void* stream) {
  with_pair_logsumexp_policy(
      loss, params, [&](const auto& p) { launch_pair_positives(p, args, workspace, stream); });
}

void pair_gradient_tile(const std::string& loss, const float* params, const PairGradient& args,
                        void* stream) {
  with_pair_policy(loss, params,
                   [&](const auto& p, auto two) { launch_pair_gradient<two>(p, args, stream); });
}

}  // namespace unitsface::cuda
