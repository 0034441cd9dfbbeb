// Tiles of losses of log-sum-exps over samples, for sm_80 and later.

#include "../policies.cuh"
#include "epilogue_pairs.cuh"
#include "gradient_store.cuh"
#include "kernels.h"
#include "mainloop_sm80.cuh"

namespace unitsface::cuda {

int64_t fused_pair_statistics_workspace(int64_t n, int64_t m) {
  // Twice, where positives have a log-sum-exp of their own.
  return 2 * 2 * (divide_up(m, kTileColumns) * n + divide_up(n, kTileRows) * m);
}

// kTwo: of the negatives and of the positives.
template <class Policy, bool kTwo>
__global__ void __launch_bounds__(kThreads, 2)
    fused_pair_negatives_kernel(const Policy policy, const FusedOperands operands,
                                const PairNegatives args, const PairPartials negatives,
                                const PairPartials positives, const TileOrder order) {
  alignas(128) __shared__ unsigned char memory[kPipelineBytes];
  const BlockTeam team{static_cast<int>(threadIdx.x), {}};
  BlockTeam::Values values;
  const Tile tile = multiply_sm80(values, team, operands, order, memory);
  PairShared& shared = *reinterpret_cast<PairShared*>(memory);
  shared.labels.stage(args.a_labels, args.b_labels, tile, team);
  team.wait();
  const PairMasks<BlockTeam> masks(shared.labels, args.diagonal, tile, team);
  log_sum_epilogue<false>(policy, masks, negatives, tile, team, values, shared);
  if constexpr (kTwo) {
    team.wait();
    log_sum_epilogue<true>(policy, masks, positives, tile, team, values, shared);
  }
}

template <class Policy>
__global__ void __launch_bounds__(kThreads, 2)
    fused_pair_positives_kernel(const Policy policy, const FusedOperands operands,
                                const PairPositives args, const PairPartials partials,
                                const TileOrder order) {
  alignas(128) __shared__ unsigned char memory[kPipelineBytes];
  const BlockTeam team{static_cast<int>(threadIdx.x), {}};
  BlockTeam::Values values;
  const Tile tile = multiply_sm80(values, team, operands, order, memory);
  PairShared& shared = *reinterpret_cast<PairShared*>(memory);
  shared.labels.stage(args.a_labels, args.b_labels, tile, team);
  team.wait();
  const PairMasks<BlockTeam> masks(shared.labels, args.diagonal, tile, team);
  positives_epilogue(policy, args, masks, partials, tile, team, values, shared);
}

template <class Policy, bool kTwo, bool kBoth>
__global__ void __launch_bounds__(kThreads, 2)
    fused_pair_gradient_kernel(const Policy policy, const FusedOperands operands,
                               const PairGradient args, const TileOrder order,
                               const GradientTile gradient) {
  alignas(128) __shared__ unsigned char memory[kPipelineBytes];
  const BlockTeam team{static_cast<int>(threadIdx.x), {}};
  BlockTeam::Values values;
  const Tile tile = multiply_sm80(values, team, operands, order, memory);
  const RegisterSink<BlockTeam> sink{gradient, tile, team, memory};
  pair_gradient_epilogue<kTwo, kBoth>(policy, args, tile, team, values, sink,
                                      memory + RegisterSink<BlockTeam>::kBytes);
}

namespace {

void fold(const PairPartials& partials, float* a_maximum, float* a_total, float* b_maximum,
          float* b_total, void* stream) {
  fold_partials<LogSums>(partials.rows, a_maximum, a_total, stream);
  if (b_maximum == nullptr) return;
  fold_partials<LogSums>(partials.columns, b_maximum, b_total, stream);
}

template <bool kTwo, class Policy>
void launch_negatives(const Policy& policy, const FusedOperands& operands,
                      const PairNegatives& args, float* workspace, void* stream) {
  if (kTwo) require_positives(args);
  if (args.n == 0 || args.m == 0) return;
  const TileOrder order(args.n, args.m);
  const bool both = args.b_maximum != nullptr;
  const PairPartials negatives(args.n, args.m, both, workspace);
  const PairPartials positives(args.n, args.m, both,
                               workspace + fused_pair_statistics_workspace(args.n, args.m) / 2);
  constexpr bool kPositives = kTwo && Policy::kPositives;
  launch("fused_pair_negatives_tile", fused_pair_negatives_kernel<Policy, kPositives>,
         order.tiles(), 1, stream, policy, operands, args, negatives, positives, order);
  fold(negatives, args.a_maximum, args.a_total, args.b_maximum, args.b_total, stream);
  if (!kPositives) return;
  fold(positives, args.a_positive_maximum, args.a_positive_total, args.b_positive_maximum,
       args.b_positive_total, stream);
}

template <class Policy>
void launch_positives(const Policy& policy, const FusedOperands& operands,
                      const PairPositives& args, float* workspace, void* stream) {
  if constexpr (Policy::kPositives) {
    if (args.n == 0 || args.m == 0) return;
    const TileOrder order(args.n, args.m);
    const PairPartials partials(args.n, args.m, args.b_loss != nullptr, workspace);
    launch("fused_pair_positives_tile", fused_pair_positives_kernel<Policy>, order.tiles(), 1,
           stream, policy, operands, args, partials, order);
    fold_partials<PlainSums>(partials.rows, args.a_loss, args.a_negative_prob, stream);
    if (args.b_loss == nullptr) return;
    fold_partials<PlainSums>(partials.columns, args.b_loss, args.b_negative_prob, stream);
  }
}

template <bool kTwo, class Policy>
void launch_gradient(const Policy& policy, const FusedOperands& operands, const PairGradient& args,
                     void* stream) {
  if (kTwo) require_positives(args);
  if (args.n == 0 || args.m == 0) return;
  const TileOrder order(args.n, args.m);
  const GradientTile gradient(args.gradient, args.gradient_dtype, args.stride);
  auto kernel = args.b_log_negatives != nullptr ? fused_pair_gradient_kernel<Policy, kTwo, true>
                                                : fused_pair_gradient_kernel<Policy, kTwo, false>;
  launch("fused_pair_gradient_tile", kernel, order.tiles(), 1, stream, policy, operands, args,
         order, gradient);
}

}  // namespace

void fused_pair_negatives_tile(const std::string& loss, const float* params,
                               const FusedOperands& operands, const PairNegatives& args,
                               float* workspace, void* stream) {
  with_pair_policy(loss, params, [&](const auto& p, auto two) {
    launch_negatives<two>(p, operands, args, workspace, stream);
  });
}

void fused_pair_positives_tile(const std::string& loss, const float* params,
                               const FusedOperands& operands, const PairPositives& args,
                               float* workspace, void* stream) {
  with_pair_logsumexp_policy(
      loss, params, [&](const auto& p) { launch_positives(p, operands, args, workspace, stream); });
}

void fused_pair_gradient_tile(const std::string& loss, const float* params,
                              const FusedOperands& operands, const PairGradient& args,
                              void* stream) {
  with_pair_policy(loss, params, [&](const auto& p, auto two) {
    launch_gradient<two>(p, operands, args, stream);
  });
}

}  // namespace unitsface::cuda
