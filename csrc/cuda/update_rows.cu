// An optimizer step on rows of a matrix, bound by memory: every number is read and written once. A
// row takes up to a warp's lanes; short rows (thresholds have one element) share a warp.

#include "common.cuh"
#include "kernels.h"
#include "unitsface/row_update.h"

namespace unitsface::cuda {

// kGroup: elements per access, 4 where rows are aligned to 16 bytes, else 1. `lane_bits`:
// 2^lane_bits lanes per row.
template <class Rule, int kGroup>
__global__ void __launch_bounds__(kThreads)
    update_rows_kernel(const UpdateRowsArgs args, int lane_bits) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t i = thread >> lane_bits;
  if (i >= args.n) return;
  const int lanes = 1 << lane_bits, lane = static_cast<int>(thread) & (lanes - 1);
  const int64_t row = (args.index != nullptr ? args.index[i] : args.start + i) * args.d;
  const float scale = args.gradient_scale != nullptr ? args.gradient_scale[0] : 1.0f;
  const Rule rule(args);
  for (int64_t k = lane * kGroup; k < args.d; k += lanes * kGroup) {
    float weight[kGroup], gradient[kGroup], first[kGroup], second[kGroup];
    load<kGroup>(args.gradient + i * args.d + k, gradient);
    load<kGroup>(args.weight + row + k, weight);
    if constexpr (Rule::kStates > 0) load<kGroup>(args.first + row + k, first);
    if constexpr (Rule::kStates > 1) load<kGroup>(args.second + row + k, second);
#pragma unroll
    for (int e = 0; e < kGroup; ++e) {
      if constexpr (Rule::kStates == 0) {
        rule(weight[e], scale * gradient[e]);
      } else if constexpr (Rule::kStates == 1) {
        rule(weight[e], scale * gradient[e], first[e]);
      } else {
        rule(weight[e], scale * gradient[e], first[e], second[e]);
      }
    }
    store<kGroup>(args.weight + row + k, weight);
    if constexpr (Rule::kStates > 0) store<kGroup>(args.first + row + k, first);
    if constexpr (Rule::kStates > 1) store<kGroup>(args.second + row + k, second);
  }
}

template <class Rule>
void launch_update_rows(const UpdateRowsArgs& args, void* stream) {
  const bool vector = args.d % 4 == 0 && aligned(args.weight, 16) && aligned(args.gradient, 16) &&
                      aligned(args.first, 16) && aligned(args.second, 16);
  const int64_t accesses = args.d / (vector ? 4 : 1);
  int lane_bits = 0;
  while (1 << lane_bits < kLanes && 1 << lane_bits < accesses) ++lane_bits;
  launch("update_rows", vector ? update_rows_kernel<Rule, 4> : update_rows_kernel<Rule, 1>,
         divide_up(args.n << lane_bits, kThreads), 1, stream, args, lane_bits);
}

void update_rows(const UpdateRowsArgs& args, void* stream) {
  if (args.n == 0 || args.d == 0) return;
  if (args.rule == RowRule::kAdamW) {
    launch_update_rows<AdamW>(args, stream);
  } else if (args.first != nullptr) {
    launch_update_rows<MomentumSgd>(args, stream);
  } else {
    launch_update_rows<Sgd>(args, stream);
  }
}

}  // namespace unitsface::cuda
