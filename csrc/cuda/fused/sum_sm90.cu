// Tiles of `sum` losses, for sm_90a.

#include "../policies.cuh"
#include "../sum_terms.cuh"
#include "epilogue_sum_sm90.cuh"
#include "tile_kernel_sm90.cuh"

namespace unitsface::cuda::sm90 {

template <class Policy, bool kColumns>
struct SumEpilogue {
  static constexpr int kBytes = sizeof(SumStripsShared<Policy>);

  Policy policy;
  SumTile args;
  SumPartials partials;

  __device__ __forceinline__ void operator()(const Tile& tile, const ConsumerTeam& team,
                                             Products& products, unsigned char* memory) const {
    strip_sums<kColumns>(policy, args, partials, tile, team, products, memory);
  }
};

namespace {

template <bool kColumns, class Policy>
void launch_sums(const Policy& policy, const FusedOperands& operands, const SumTile& args,
                 const SumPartials& partials, void* stream) {
  const SumEpilogue<Policy, kColumns> epilogue{policy, args, partials};
  launch_tiles("fused_sum_tile (sm_90a)", epilogue, operands, args.n, args.m, args.gradient,
               args.gradient_dtype, args.stride, stream);
}

template <class Policy>
void launch_sum(const Policy& policy, const FusedOperands& operands, const SumTile& args,
                float* workspace, void* stream) {
  if (args.n == 0 || args.m == 0) return;
  const TileOrder order(args.n, args.m);
  const SumPartials partials =
      sum_partials(args, workspace, order.column_tiles, order.row_tiles, kTileRows);
  const bool thresholds = args.per_column && args.b_dthreshold != nullptr;
  if (args.b_loss != nullptr || thresholds) {
    launch_sums<true>(policy, operands, args, partials, stream);
  } else {
    launch_sums<false>(policy, operands, args, partials, stream);
  }
  add_partials(partials, args, order.column_tiles, order.row_tiles, stream);
}

}  // namespace

void fused_sum_tile(const std::string& loss, const float* params, const FusedOperands& operands,
                    const SumTile& args, float* workspace, void* stream) {
  // Two thresholds of a pair would be two softplus.
  const bool served =
      !separate_thresholds(args) &&
      supports(operands, args.n, args.m, args.gradient, args.gradient_dtype, args.stride);
  with_sum_policy(loss, params, [&](const auto& policy) {
    if constexpr (kLinearLogit<std::decay_t<decltype(policy)>>) {
      if (served) return launch_sum(policy, operands, args, workspace, stream);
    }
    cuda::fused_sum_tile(loss, params, operands, args, workspace, stream);
  });
}

}  // namespace unitsface::cuda::sm90
