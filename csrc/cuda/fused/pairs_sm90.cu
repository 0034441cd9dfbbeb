// Tiles of losses of log-sum-exps over samples, for sm_90a.

#include "../policies.cuh"
#include "epilogue_log_sums_sm90.cuh"
#include "epilogue_pairs_sm90.cuh"
#include "tile_kernel_sm90.cuh"

namespace unitsface::cuda::sm90 {

namespace {

// Partials of the rows and of the columns of a matrix of n x m, in this order, `kind` of two.
struct PairPartials {
  Partials rows, columns;

  PairPartials(int64_t n, int64_t m, float* workspace, int kind)
      : rows{workspace + kind * fused_pair_statistics_workspace(n, m) / 2,
             divide_up(m, kTileColumns), n},
        columns{rows.data + 2 * rows.segments * n, divide_up(n, kTileRows), m} {}
};

}  // namespace

template <class Policy, bool kTwo, bool kBoth>
struct PairNegativesEpilogue {
  static constexpr int kKinds = kTwo ? 2 : 1;
  static constexpr int kBytes = sizeof(LogSumsShared<kKinds>);

  Policy policy;
  PairNegatives args;
  Partials rows[kKinds], columns[kKinds];

  __device__ __forceinline__ void operator()(const Tile& tile, const ConsumerTeam& team,
                                             Products& products, unsigned char* memory) const {
    strip_log_sums<kTwo, kBoth>(policy, args, rows, columns, tile, team, products, memory);
  }
};

template <class Policy, bool kBoth>
struct PairPositivesEpilogue {
  static constexpr int kBytes = sizeof(PositivesShared<kBoth>);

  Policy policy;
  PairPositives args;
  Partials rows, columns;

  __device__ __forceinline__ void operator()(const Tile& tile, const ConsumerTeam& team,
                                             Products& products, unsigned char* memory) const {
    strip_positives<kBoth>(policy, args, rows, columns, tile, team, products, memory);
  }
};

template <class Policy, bool kTwo, bool kBoth>
struct PairGradientEpilogue {
  static constexpr int kBytes = sizeof(PairColumns);

  Policy policy;
  PairGradient args;

  __device__ __forceinline__ void operator()(const Tile& tile, const ConsumerTeam& team,
                                             Products& products, unsigned char* memory) const {
    strip_pair_gradients<kTwo, kBoth>(policy, args, tile, team, products, memory);
  }
};

namespace {

template <bool kTwo, bool kBoth, class Policy>
void launch_negatives(const Policy& policy, const FusedOperands& operands,
                      const PairNegatives& args, float* workspace, void* stream) {
  PairNegativesEpilogue<Policy, kTwo, kBoth> epilogue{policy, args, {}, {}};
  for (int kind = 0; kind < epilogue.kKinds; ++kind) {
    const PairPartials partials(args.n, args.m, workspace, kind);
    epilogue.rows[kind] = partials.rows, epilogue.columns[kind] = partials.columns;
  }
  launch_tiles("fused_pair_negatives_tile (sm_90a)", epilogue, operands, args.n, args.m, nullptr,
               operands.dtype, 0, stream);
  fold_partials<LogSums>(epilogue.rows[0], args.a_maximum, args.a_total, stream);
  if (kBoth) fold_partials<LogSums>(epilogue.columns[0], args.b_maximum, args.b_total, stream);
  if constexpr (kTwo) {
    fold_partials<LogSums>(epilogue.rows[1], args.a_positive_maximum, args.a_positive_total,
                           stream);
    if (!kBoth) return;
    fold_partials<LogSums>(epilogue.columns[1], args.b_positive_maximum, args.b_positive_total,
                           stream);
  }
}

template <bool kBoth, class Policy>
void launch_positives(const Policy& policy, const FusedOperands& operands,
                      const PairPositives& args, float* workspace, void* stream) {
  const PairPartials partials(args.n, args.m, workspace, 0);
  const PairPositivesEpilogue<Policy, kBoth> epilogue{policy, args, partials.rows,
                                                      partials.columns};
  launch_tiles("fused_pair_positives_tile (sm_90a)", epilogue, operands, args.n, args.m, nullptr,
               operands.dtype, 0, stream);
  fold_partials<PlainSums>(partials.rows, args.a_loss, args.a_negative_prob, stream);
  if (kBoth) fold_partials<PlainSums>(partials.columns, args.b_loss, args.b_negative_prob, stream);
}

template <bool kTwo, bool kBoth, class Policy>
void launch_gradient(const Policy& policy, const FusedOperands& operands, const PairGradient& args,
                     void* stream) {
  const PairGradientEpilogue<Policy, kTwo, kBoth> epilogue{policy, args};
  launch_tiles("fused_pair_gradient_tile (sm_90a)", epilogue, operands, args.n, args.m,
               args.gradient, args.gradient_dtype, args.stride, stream);
}

}  // namespace

void fused_pair_negatives_tile(const std::string& loss, const float* params,
                               const FusedOperands& operands, const PairNegatives& args,
                               float* workspace, void* stream) {
  if (!supports(operands, args.n, args.m, nullptr, operands.dtype, 0)) {
    return cuda::fused_pair_negatives_tile(loss, params, operands, args, workspace, stream);
  }
  with_pair_policy(loss, params, [&](const auto& policy, auto two) {
    if (two) require_positives(args);
    if (args.n == 0 || args.m == 0) return;
    if (args.b_maximum != nullptr) {
      launch_negatives<two, true>(policy, operands, args, workspace, stream);
    } else {
      launch_negatives<two, false>(policy, operands, args, workspace, stream);
    }
  });
}

void fused_pair_positives_tile(const std::string& loss, const float* params,
                               const FusedOperands& operands, const PairPositives& args,
                               float* workspace, void* stream) {
  if (!supports(operands, args.n, args.m, nullptr, operands.dtype, 0)) {
    return cuda::fused_pair_positives_tile(loss, params, operands, args, workspace, stream);
  }
  with_pair_logsumexp_policy(loss, params, [&](const auto& policy) {
    if constexpr (std::decay_t<decltype(policy)>::kPositives) {
      if (args.n == 0 || args.m == 0) return;
      if (args.b_loss != nullptr) {
        launch_positives<true>(policy, operands, args, workspace, stream);
      } else {
        launch_positives<false>(policy, operands, args, workspace, stream);
      }
    }
  });
}

void fused_pair_gradient_tile(const std::string& loss, const float* params,
                              const FusedOperands& operands, const PairGradient& args,
                              void* stream) {
  if (!supports(operands, args.n, args.m, args.gradient, args.gradient_dtype, args.stride)) {
    return cuda::fused_pair_gradient_tile(loss, params, operands, args, stream);
  }
  with_pair_policy(loss, params, [&](const auto& policy, auto two) {
    if (two) require_positives(args);
    if (args.n == 0 || args.m == 0) return;
    if (args.b_log_negatives != nullptr) {
      launch_gradient<two, true>(policy, operands, args, stream);
    } else {
      launch_gradient<two, false>(policy, operands, args, stream);
    }
  });
}

}  // namespace unitsface::cuda::sm90
