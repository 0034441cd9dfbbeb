// Tiles of `logsumexp` losses over classes, for sm_80 and later.

#include "../policies.cuh"
#include "epilogue_logsumexp.cuh"
#include "gradient_store.cuh"
#include "kernels.h"
#include "mainloop_sm80.cuh"

namespace unitsface::cuda {

int64_t fused_logsumexp_tile_workspace(int64_t n, int64_t m) {
  return 2 * divide_up(m, kTileColumns) * n;
}

template <class Policy>
__global__ void __launch_bounds__(kThreads, 2)
    fused_logsumexp_kernel(const Policy policy, const FusedOperands operands,
                           const LogsumexpTileArgs args, const Partials partials,
                           const TileOrder order) {
  alignas(128) __shared__ unsigned char memory[kPipelineBytes];
  const BlockTeam team{static_cast<int>(threadIdx.x), {}};
  BlockTeam::Values values;
  const Tile tile = multiply_sm80(values, team, operands, order, memory);
  logsumexp_epilogue(policy, args, partials, tile, team, values, memory);
}

template <class Policy>
__global__ void __launch_bounds__(kThreads, 2)
    fused_logsumexp_gradient_kernel(const Policy policy, const FusedOperands operands,
                                    const LogsumexpGradientArgs args, const TileOrder order,
                                    const GradientTile gradient) {
  alignas(128) __shared__ unsigned char memory[kPipelineBytes];
  const BlockTeam team{static_cast<int>(threadIdx.x), {}};
  BlockTeam::Values values;
  const Tile tile = multiply_sm80(values, team, operands, order, memory);
  const RegisterSink<BlockTeam> sink{gradient, tile, team, memory};
  logsumexp_gradient_epilogue(policy, args, tile, team, values, sink,
                              memory + RegisterSink<BlockTeam>::kBytes);
}

void fused_logsumexp_tile(const std::string& loss, const float* params,
                          const FusedOperands& operands, const LogsumexpTileArgs& args,
                          float* workspace, void* stream) {
  with_logsumexp_policy(loss, params, [&](const auto& policy) {
    if (args.n == 0 || args.m == 0) return;
    const TileOrder order(args.n, args.m);
    const Partials partials{workspace, order.column_tiles, args.n};
    launch("fused_logsumexp_tile", fused_logsumexp_kernel<std::decay_t<decltype(policy)>>,
           order.tiles(), 1, stream, policy, operands, args, partials, order);
    fold_partials<LogSums>(partials, args.maximum, args.total, stream);
  });
}

void fused_logsumexp_gradient_tile(const std::string& loss, const float* params,
                                   const FusedOperands& operands, const LogsumexpGradientArgs& args,
                                   void* stream) {
  with_logsumexp_policy(loss, params, [&](const auto& policy) {
    if (args.n == 0 || args.m == 0) return;
    const TileOrder order(args.n, args.m);
    const GradientTile gradient(args.gradient, args.gradient_dtype, args.stride);
    launch("fused_logsumexp_gradient_tile",
           fused_logsumexp_gradient_kernel<std::decay_t<decltype(policy)>>, order.tiles(), 1,
           stream, policy, operands, args, order, gradient);
  });
}

}  // namespace unitsface::cuda
