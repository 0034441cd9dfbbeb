// Tiles of `logsumexp` losses: the negatives' running maximum and sum, and the gradient.
//
// A warp takes 1024 columns of a row, held in registers. Pass 1 leaves one (maximum, sum) per warp,
// which a second kernel merges into the rows' running values in a fixed order.

#include "common.cuh"
#include "kernels.h"
#include "policies.cuh"

namespace unitsface::cuda {

constexpr int kItems = 32;  // columns per lane
constexpr int kSpan = kItems * kLanes;

int64_t logsumexp_tile_workspace(int64_t n, int64_t m) { return 2 * divide_up(m, kSpan) * n; }

// sum = sum of exp(z - maximum). The sum carries NaN, which fmaxf drops.
struct LogSum {
  float maximum, sum;
};

// exp(z - shift) is 0 for z = -inf, even if every value so far was -inf.
UF_HOST_DEVICE float finite_shift(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

UF_HOST_DEVICE LogSum merge(LogSum a, LogSum b) {
  const float maximum = fmaxf(a.maximum, b.maximum);
  const float shift = finite_shift(maximum);
  return {maximum, a.sum * expf(a.maximum - shift) + b.sum * expf(b.maximum - shift)};
}

// Position of a warp: eight rows of one span per block.
struct Place {
  int64_t row, first_column;
  unsigned segment;
  int width, target;  // columns of the span; position of the target in it, or -1
};

__device__ __forceinline__ Place place_of_warp(int64_t m, unsigned segments) {
  Place place;
  place.row = static_cast<int64_t>(blockIdx.x / segments) * kWarps + threadIdx.x / kLanes;
  place.segment = blockIdx.x % segments;
  place.first_column = static_cast<int64_t>(place.segment) * kSpan;
  place.width = static_cast<int>(min(m - place.first_column, static_cast<int64_t>(kSpan)));
  place.target = -1;
  return place;
}

// Position in the span of a column of the whole matrix, -1 if it lies outside.
UF_HOST_DEVICE int position_in_span(int64_t target, int64_t start, const Place& place) {
  const int64_t position = target - start - place.first_column;
  return position >= 0 && position < place.width ? static_cast<int>(position) : -1;
}

template <class Policy, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    logsumexp_tile_kernel(const Policy policy, const LogsumexpTileArgs args, float* partials,
                          unsigned segments) {
  using Lane = Columns<kVector, kItems>;
  const int lane = threadIdx.x % kLanes;
  Place place = place_of_warp(args.m, segments);
  if (place.row >= args.n) return;
  place.target = position_in_span(args.targets[place.row], args.start, place);

  const float* row = args.cosines + place.row * args.stride + place.first_column;
  float logits[kItems] = {};
  Lane::read(row, lane, place.width, logits);
  const int target = place.target - Lane::first(lane);
  const int width = place.width - Lane::first(lane);
  float maximum = -INFINITY;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const float z = policy.negative(logits[k]).value;
    logits[k] = Lane::offset(k) < width && Lane::offset(k) != target ? z : -INFINITY;
    maximum = fmaxf(maximum, logits[k]);
  }
  maximum = warp_max(maximum);
  const float shift = finite_shift(maximum);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kItems; ++k) sum += expf(logits[k] - shift);
  sum = warp_sum(sum);
  if (lane > 0) return;
  const int64_t position = place.segment * args.n + place.row;
  partials[position] = maximum;
  partials[segments * args.n + position] = sum;
  if (place.target >= 0) args.target_cosine[place.row] = row[place.target];
}

// A block serves 32 rows; its warps share the segments.
__global__ void __launch_bounds__(kThreads)
    merge_partials_kernel(const float* partials, int64_t segments, int64_t n, float* maximum,
                          float* total) {
  __shared__ float maxima[kWarps][kLanes], sums[kWarps][kLanes];
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  LogSum result = {-INFINITY, 0.0f};
  if (row < n) {
    for (int64_t k = warp; k < segments; k += kWarps) {
      result = merge(result, {partials[k * n + row], partials[(segments + k) * n + row]});
    }
  }
  maxima[warp][lane] = result.maximum;
  sums[warp][lane] = result.sum;
  __syncthreads();
  if (warp > 0 || row >= n) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) result = merge(result, {maxima[w][lane], sums[w][lane]});
  result = merge({maximum[row], total[row]}, result);
  maximum[row] = result.maximum;
  total[row] = result.sum;
}

template <class Policy, bool kVector>
__global__ void __launch_bounds__(kThreads, 2)
    logsumexp_gradient_kernel(const Policy policy, const LogsumexpGradientArgs args,
                              unsigned segments) {
  using Lane = Columns<kVector, kItems>;
  const int lane = threadIdx.x % kLanes;
  Place place = place_of_warp(args.m, segments);
  if (place.row >= args.n) return;
  place.target = position_in_span(args.targets[place.row], args.start, place);

  const int64_t offset = place.row * args.stride + place.first_column;
  const float weight = args.negative_weight[place.row];
  const float log_negatives = args.log_negatives[place.row];
  const float target_gradient = args.target_gradient[place.row];
  const int target = place.target - Lane::first(lane);
  float values[kItems] = {};
  Lane::read(args.cosines + offset, lane, place.width, values);
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    const Logit z = policy.negative(values[k]);
    const float negative = weight * expf(z.value - log_negatives) * z.dcosine;
    const float gradient = Lane::offset(k) == target ? target_gradient : negative;
    // A row without weight has a gradient of 0 for any cosines, NaN included.
    values[k] = weight != 0.0f ? gradient * args.gradient_scale : 0.0f;
  }
  Lane::write(args.gradient, args.gradient_dtype, offset, lane, place.width, values);
}

template <class Policy>
__global__ void __launch_bounds__(kThreads)
    positive_rows_kernel(const Policy policy, const float* cosine, int64_t n, float* logit,
                         float* slope) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= n) return;
  const Logit positive = policy.positive(cosine[row]);
  logit[row] = positive.value;
  slope[row] = positive.dcosine;
}

template <class Policy>
void launch_logsumexp_tile(const Policy& policy, const LogsumexpTileArgs& args, float* workspace,
                           void* stream) {
  if (args.n == 0 || args.m == 0) return;
  const int64_t segments = divide_up(args.m, kSpan);
  const bool vector = vectorizable(args.cosines, nullptr, DType::kFloat32, args.m, args.stride);
  launch("logsumexp_tile",
         vector ? logsumexp_tile_kernel<Policy, true> : logsumexp_tile_kernel<Policy, false>,
         divide_up(args.n, kWarps) * segments, 1, stream, policy, args, workspace,
         static_cast<unsigned>(segments));
  launch("logsumexp_tile (merge)", merge_partials_kernel, divide_up(args.n, kLanes), 1, stream,
         workspace, segments, args.n, args.maximum, args.total);
}

template <class Policy>
void launch_logsumexp_gradient_tile(const Policy& policy, const LogsumexpGradientArgs& args,
                                    void* stream) {
  if (args.n == 0 || args.m == 0) return;
  const int64_t segments = divide_up(args.m, kSpan);
  const bool vector =
      vectorizable(args.cosines, args.gradient, args.gradient_dtype, args.m, args.stride);
  launch(
      "logsumexp_gradient_tile",
      vector ? logsumexp_gradient_kernel<Policy, true> : logsumexp_gradient_kernel<Policy, false>,
      divide_up(args.n, kWarps) * segments, 1, stream, policy, args,
      static_cast<unsigned>(segments));
}

void logsumexp_tile(const std::string& loss, const float* params, const LogsumexpTileArgs& args,
                    float* workspace, void* stream) {
  with_logsumexp_policy(loss, params, [&](const auto& policy) {
    launch_logsumexp_tile(policy, args, workspace, stream);
  });
}

void logsumexp_gradient_tile(const std::string& loss, const float* params,
                             const LogsumexpGradientArgs& args, void* stream) {
  with_logsumexp_policy(loss, params, [&](const auto& policy) {
    launch_logsumexp_gradient_tile(policy, args, stream);
  });
}

void positive_rows(const std::string& loss, const float* params, const float* cosine, int64_t n,
                   float* logit, float* slope, void* stream) {
  const auto run = [&](const auto& policy) {
    if (n == 0) return;
    launch("positive_rows", positive_rows_kernel<std::decay_t<decltype(policy)>>,
           divide_up(n, kThreads), 1, stream, policy, cosine, n, logit, slope);
  };
#define UF_LOGSUMEXP_LOSS(name, Policy) \
  if (loss == #name) return with_policy<Policy, kHasPositive<Policy>>(loss, params, run);
#include "unitsface/loss_list.def"
  throw std::invalid_argument("no logsumexp loss is called " + loss);
}

}  // namespace unitsface::cuda
