// Kernels that multiply and run the policy on the products, which never reach memory. Arguments are
// those of ../kernels.h with `cosines` ignored; launches, errors and results likewise.
#pragma once

#include <string>

#include "../kernels.h"
#include "operands.h"

namespace unitsface::cuda {

template <class Args>
using Driver = void(const std::string& loss, const float* params, const FusedOperands& operands,
                    const Args& args, void* stream);
template <class Args>
using WorkspaceDriver = void(const std::string& loss, const float* params,
                             const FusedOperands& operands, const Args& args, float* workspace,
                             void* stream);

// Floats of workspace.
int64_t fused_sum_tile_workspace(int64_t n, int64_t m);
int64_t fused_logsumexp_tile_workspace(int64_t n, int64_t m);
// Of fused_pair_negatives_tile and fused_pair_positives_tile.
int64_t fused_pair_statistics_workspace(int64_t n, int64_t m);

WorkspaceDriver<SumTile> fused_sum_tile;
// Only the total of the rows' losses, of tiles without weights and with one threshold: added to
// args.a_loss, and the threshold's gradient to args.b_dthreshold, both of fused_sum_total_slots
// numbers whose sums count. With args.b_loss a pair counts twice; nothing is written there.
int64_t fused_sum_total_slots(int64_t n, int64_t m);
Driver<SumTile> fused_sum_total;
WorkspaceDriver<LogsumexpTileArgs> fused_logsumexp_tile;
Driver<LogsumexpGradientArgs> fused_logsumexp_gradient_tile;
WorkspaceDriver<PairNegatives> fused_pair_negatives_tile;
WorkspaceDriver<PairPositives> fused_pair_positives_tile;
Driver<PairGradient> fused_pair_gradient_tile;

// For compute capability 9.0. They call those above where supports() is false.
namespace sm90 {

// bfloat16 or float16 in rows that start at multiples of 16 bytes, and a gradient of 16 bits, if
// any, of which the same is true.
bool supports(const FusedOperands& operands, int64_t n, int64_t m, const void* gradient,
              DType gradient_dtype, int64_t stride);

// Served: losses that are a softplus of a logit linear in the cosine (kLinearLogit), and of sums
// per row those with one threshold for both directions of a pair.
WorkspaceDriver<SumTile> fused_sum_tile;
int64_t fused_sum_total_slots(int64_t n, int64_t m);
Driver<SumTile> fused_sum_total;
WorkspaceDriver<LogsumexpTileArgs> fused_logsumexp_tile;
Driver<LogsumexpGradientArgs> fused_logsumexp_gradient_tile;
WorkspaceDriver<PairNegatives> fused_pair_negatives_tile;
WorkspaceDriver<PairPositives> fused_pair_positives_tile;
Driver<PairGradient> fused_pair_gradient_tile;

}  // namespace sm90

}  // namespace unitsface::cuda
