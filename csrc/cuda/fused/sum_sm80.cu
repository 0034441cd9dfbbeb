// Tiles of `sum` losses, for sm_80 and later.

#include "../policies.cuh"
#include "epilogue_sum.cuh"
#include "gradient_store.cuh"
#include "kernels.h"
#include "mainloop_sm80.cuh"

namespace unitsface::cuda {

int64_t fused_sum_tile_workspace(int64_t n, int64_t m) {
  const TileOrder order(n, m);
  return 2 * (order.column_tiles * n + order.row_tiles * m);
}

template <class Policy, bool kSeparate>
__global__ void __launch_bounds__(kThreads, kSeparate ? 1 : 2)
    fused_sum_kernel(const Policy policy, const FusedOperands operands, const SumTile args,
                     const SumPartials partials, const TileOrder order,
                     const GradientTile gradient) {
  static_assert(RegisterSink<BlockTeam>::kBytes + sizeof(SumShared) <= kPipelineBytes,
                "the epilogue takes the place of the pipeline");
  alignas(128) __shared__ unsigned char memory[kPipelineBytes];
  const BlockTeam team{static_cast<int>(threadIdx.x), {}};
  BlockTeam::Values values;
  const Tile tile = multiply_sm80(values, team, operands, order, memory);
  const RegisterSink<BlockTeam> sink{gradient, tile, team, memory};
  sum_epilogue<kSeparate>(policy, args, partials, tile, team, values, sink,
                          memory + RegisterSink<BlockTeam>::kBytes);
}

template <class Policy>
void launch_fused_sum(const Policy& policy, const FusedOperands& operands, const SumTile& args,
                      float* workspace, void* stream) {
  if (args.n == 0 || args.m == 0) return;
  const TileOrder order(args.n, args.m);
  const SumPartials partials =
      sum_partials(args, workspace, order.column_tiles, order.row_tiles, kTileRows);
  const GradientTile gradient(args.gradient, args.gradient_dtype, args.stride);
  const auto kernel = separate_thresholds_of<Policy>(args)
                          ? fused_sum_kernel<Policy, Policy::kRowThresholds>
                          : fused_sum_kernel<Policy, false>;
  launch("fused_sum_tile", kernel, order.tiles(), 1, stream, policy, operands, args, partials,
         order, gradient);
  add_partials(partials, args, order.column_tiles, order.row_tiles, stream);
}

void fused_sum_tile(const std::string& loss, const float* params, const FusedOperands& operands,
                    const SumTile& args, float* workspace, void* stream) {
  with_sum_policy(loss, params, [&](const auto& policy) {
    launch_fused_sum(policy, operands, args, workspace, stream);
  });
}

}  // namespace unitsface::cuda
