// Totals of `sum` losses, for sm_90a.

#include "../policies.cuh"
#include "epilogue_softplus.cuh"
#include "kernels.h"
#include "launch_sm90.cuh"

namespace unitsface::cuda {

namespace sm90 {

using TotalMemory = Memory<4, 2>;

// After the pipeline's shared memory.
constexpr int kTotalBytes =
    TotalMemory::kBytes + kConsumers * static_cast<int>(sizeof(SoftplusShared));
static_assert(kTotalBytes <= 232448, "227 KB");

template <class Policy>
struct TotalWork {
  const Policy& policy;
  const SumTile& args;
  const CUtensorMap* gradient;
  bool half;
  ConsumerTeam team;
  unsigned char* slabs;
  SoftplusShared& shared;
  float threshold;
  Totals totals;

  __device__ __forceinline__ void prepare(const Tile& tile) {
    read_columns(shared, args, tile, team);
    if (!planted(28)) team.wait();
  }
  __device__ __forceinline__ void operator()(const Tile& tile, Products& products) {
    softplus_epilogue(policy, args, threshold, tile, team, products, shared, totals);
    if (args.gradient != nullptr) {
      store_tile<TotalMemory::kWarpSlabs>(gradient, slabs, tile, products, half, team.row_warp());
    }
  }
};

template <class Policy>
__global__ void __launch_bounds__(kBlockThreads, 1)
    fused_total_sm90_kernel(const Policy policy, const SumTile args,
                            const __grid_constant__ TensorMaps maps, const TileOrder order,
                            int chunks, bool half, const Grid grid) {
  const TotalMemory memory{dynamic_shared()};
  const Range range = range_of(order, static_cast<int>(blockIdx.x), grid);
  run_block(maps, memory, range, chunks, [&](int consumer) {
    const ConsumerTeam team = team_of(consumer);
    const int warp = consumer * kWarpgroupWarps + team.row_warp();
    auto* shared = reinterpret_cast<SoftplusShared*>(memory.end()) + consumer;
    TotalWork<Policy> work = {policy,
                              args,
                              &maps.gradient,
                              args.gradient_dtype == DType::kFloat16,
                              team,
                              memory.slabs(warp),
                              *shared,
                              __ldg(args.b_threshold),
                              {}};
    consume(memory, range, order, chunks, half, consumer, work);
    finish_stores();
    const float loss = warp_sum(work.totals.loss);
    const float dthreshold = warp_sum(work.totals.dthreshold);
    if (team.lane() > 0) return;
    const int slot = static_cast<int>(blockIdx.x) * kConsumers * kWarpgroupWarps + warp;
    args.a_loss[slot] += loss;
    if (args.b_dthreshold != nullptr) args.b_dthreshold[slot] += dthreshold;
  });
}

template <class Policy>
void launch_total(const Policy& policy, const FusedOperands& operands, const SumTile& args,
                  void* stream) {
  if (args.n == 0 || args.m == 0) return;
  const TileOrder order(args.n, args.m);
  const Grid grid = grid_of(order);
  launch_persistent(
      "fused_sum_total (sm_90a)", fused_total_sm90_kernel<Policy>, grid, kTotalBytes, stream,
      policy, args,
      tensor_maps(operands, args.n, args.m, args.gradient, args.gradient_dtype, args.stride, grid),
      order, static_cast<int>(divide_up(operands.depth, kChunk)), operands.dtype == DType::kFloat16,
      grid);
}

int64_t fused_sum_total_slots(int64_t n, int64_t m) {
  return max(cuda::fused_sum_total_slots(n, m),
             int64_t{kMostBlocks * kConsumers * kWarpgroupWarps});
}

void fused_sum_total(const std::string& loss, const float* params, const FusedOperands& operands,
                     const SumTile& args, void* stream) {
  const bool served =
      supports(operands, args.n, args.m, args.gradient, args.gradient_dtype, args.stride);
  with_sum_policy(loss, params, [&](const auto& policy) {
    if constexpr (kLinearLogit<std::decay_t<decltype(policy)>>) {
      if (served) return launch_total(policy, operands, args, stream);
    }
    cuda::fused_sum_total(loss, params, operands, args, stream);
  });
}

}  // namespace sm90

}  // namespace unitsface::cuda
