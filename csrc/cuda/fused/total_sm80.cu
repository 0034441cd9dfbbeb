// Tiles of `sum` losses of which only the total is wanted, for sm_80 and later.

#include "../policies.cuh"
#include "epilogue_total.cuh"
#include "gradient_store.cuh"
#include "kernels.h"
#include "mainloop_sm80.cuh"

namespace unitsface::cuda {

int64_t fused_sum_total_slots(int64_t n, int64_t m) { return TileOrder(n, m).tiles(); }

template <class Policy>
__global__ void __launch_bounds__(kThreads, 2)
    fused_total_kernel(const Policy policy, const FusedOperands operands, const SumTile args,
                       const TileOrder order, const GradientTile gradient) {
  alignas(128) __shared__ unsigned char memory[kPipelineBytes];
  const BlockTeam team{static_cast<int>(threadIdx.x), {}};
  BlockTeam::Values values;
  const Tile tile = multiply_sm80(values, team, operands, order, memory);
  const RegisterSink<BlockTeam> sink{gradient, tile, team, memory};
  total_epilogue(policy, args, tile, team, values, sink, blockIdx.x,
                 memory + RegisterSink<BlockTeam>::kBytes);
}

void fused_sum_total(const std::string& loss, const float* params, const FusedOperands& operands,
                     const SumTile& args, void* stream) {
  with_sum_policy(loss, params, [&](const auto& policy) {
    if (args.n == 0 || args.m == 0) return;
    const TileOrder order(args.n, args.m);
    const GradientTile gradient(args.gradient, args.gradient_dtype, args.stride);
    launch("fused_sum_total", fused_total_kernel<std::decay_t<decltype(policy)>>, order.tiles(), 1,
           stream, policy, operands, args, order, gradient);
  });
}

}  // namespace unitsface::cuda
