// Kernels that multiply and run the policy on the products, which never reach memory. Arguments are
// those of ../kernels.h with `cosines` ignored; launches, errors and results likewise.
#pragma once

#include <string>

#include "../kernels.h"
#include "operands.h"

namespace unitsface::cuda {

// Floats of workspace.
int64_t fused_sum_tile_workspace(int64_t n, int64_t m);
int64_t fused_logsumexp_tile_workspace(int64_t n, int64_t m);
// Of fused_pair_negatives_tile and fused_pair_positives_tile.
int64_t fused_pair_statistics_workspace(int64_t n, int64_t m);

void fused_sum_tile(const std::string& loss, const float* params, const FusedOperands& operands,
                    const SumTile& args, float* workspace, void* stream);
// Only the total of the rows' losses, of tiles without weights and with one threshold: added to
// args.a_loss, and the threshold's gradient to args.b_dthreshold, both of fused_sum_total_slots
// numbers whose sums count. With args.b_loss a pair counts twice; nothing is written there.
int64_t fused_sum_total_slots(int64_t n, int64_t m);
void fused_sum_total(const std::string& loss, const float* params, const FusedOperands& operands,
                     const SumTile& args, void* stream);
void fused_logsumexp_tile(const std::string& loss, const float* params,
                          const FusedOperands& operands, const LogsumexpTileArgs& args,
                          float* workspace, void* stream);
void fused_logsumexp_gradient_tile(const std::string& loss, const float* params,
                                   const FusedOperands& operands, const LogsumexpGradientArgs& args,
                                   void* stream);
void fused_pair_negatives_tile(const std::string& loss, const float* params,
                               const FusedOperands& operands, const PairNegatives& args,
                               float* workspace, void* stream);
void fused_pair_positives_tile(const std::string& loss, const float* params,
                               const FusedOperands& operands, const PairPositives& args,
                               float* workspace, void* stream);
void fused_pair_gradient_tile(const std::string& loss, const float* params,
                              const FusedOperands& operands, const PairGradient& args,
                              void* stream);

}  // namespace unitsface::cuda
