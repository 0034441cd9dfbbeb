// Tiles of `logsumexp` losses over classes, for sm_90a.

#include "../policies.cuh"
#include "epilogue_logsumexp.cuh"
#include "tile_kernel_sm90.cuh"

namespace unitsface::cuda::sm90 {

template <class Policy>
struct StatisticsEpilogue {
  static constexpr int kBytes = sizeof(StripStatistics);

  Policy policy;
  LogsumexpTileArgs args;
  Partials partials;

  __device__ __forceinline__ void operator()(const Tile& tile, const ConsumerTeam& team,
                                             Products& products, unsigned char* memory) const {
    logsumexp_epilogue(policy, args, partials, tile, team, products, memory);
  }
};

template <class Policy>
struct GradientEpilogue {
  static constexpr int kBytes = kTileRows * sizeof(ClassRow);

  Policy policy;
  LogsumexpGradientArgs args;

  __device__ __forceinline__ void operator()(const Tile& tile, const ConsumerTeam& team,
                                             Products& products, unsigned char* memory) const {
    logsumexp_gradient_epilogue(policy, args, tile, team, products, KeepSink{}, memory);
  }
};

void fused_logsumexp_tile(const std::string& loss, const float* params,
                          const FusedOperands& operands, const LogsumexpTileArgs& args,
                          float* workspace, void* stream) {
  if (!supports(operands, args.n, args.m, nullptr, operands.dtype, 0)) {
    return cuda::fused_logsumexp_tile(loss, params, operands, args, workspace, stream);
  }
  with_logsumexp_policy(loss, params, [&](const auto& policy) {
    if (args.n == 0 || args.m == 0) return;
    const Partials partials{workspace, TileOrder(args.n, args.m).column_tiles, args.n};
    const StatisticsEpilogue<std::decay_t<decltype(policy)>> epilogue{policy, args, partials};
    launch_tiles("fused_logsumexp_tile (sm_90a)", epilogue, operands, args.n, args.m, nullptr,
                 operands.dtype, 0, stream);
    fold_partials<LogSums>(partials, args.maximum, args.total, stream);
  });
}

void fused_logsumexp_gradient_tile(const std::string& loss, const float* params,
                                   const FusedOperands& operands, const LogsumexpGradientArgs& args,
                                   void* stream) {
  if (!supports(operands, args.n, args.m, args.gradient, args.gradient_dtype, args.stride)) {
    return cuda::fused_logsumexp_gradient_tile(loss, params, operands, args, stream);
  }
  with_logsumexp_policy(loss, params, [&](const auto& policy) {
    if (args.n == 0 || args.m == 0) return;
    const GradientEpilogue<std::decay_t<decltype(policy)>> epilogue{policy, args};
    launch_tiles("fused_logsumexp_gradient_tile (sm_90a)", epilogue, operands, args.n, args.m,
                 args.gradient, args.gradient_dtype, args.stride, stream);
  });
}

}  // namespace unitsface::cuda::sm90
