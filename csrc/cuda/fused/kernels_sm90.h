// Fused kernels for sm_90a. Functions have the names and the arguments of those of kernels.h, and
// call them where supports() is false.
#pragma once

#include <string>

#include "../kernels.h"
#include "operands.h"

namespace unitsface::cuda::sm90 {

// bfloat16 or float16 in rows that start at multiples of 16 bytes, and a gradient of 16 bits, if
// any, of which the same is true.
bool supports(const FusedOperands& operands, int64_t n, int64_t m, const void* gradient,
              DType gradient_dtype, int64_t stride);

void fused_pair_negatives_tile(const std::string& loss, const float* params,
                               const FusedOperands& operands, const PairNegatives& args,
                               float* workspace, void* stream);
void fused_pair_positives_tile(const std::string& loss, const float* params,
                               const FusedOperands& operands, const PairPositives& args,
                               float* workspace, void* stream);
void fused_pair_gradient_tile(const std::string& loss, const float* params,
                              const FusedOperands& operands, const PairGradient& args,
                              void* stream);
void fused_logsumexp_tile(const std::string& loss, const float* params,
                          const FusedOperands& operands, const LogsumexpTileArgs& args,
                          float* workspace, void* stream);
void fused_logsumexp_gradient_tile(const std::string& loss, const float* params,
                                   const FusedOperands& operands, const LogsumexpGradientArgs& args,
                                   void* stream);

// Served: losses that are a softplus of a logit linear in the cosine (kLinearLogit), and of sums
// per row those with one threshold for both directions of a pair.
void fused_sum_tile(const std::string& loss, const float* params, const FusedOperands& operands,
                    const SumTile& args, float* workspace, void* stream);
// Served: losses that are a softplus of a logit linear in the cosine (kLinearLogit).
int64_t fused_sum_total_slots(int64_t n, int64_t m);
void fused_sum_total(const std::string& loss, const float* params, const FusedOperands& operands,
                     const SumTile& args, void* stream);

}  // namespace unitsface::cuda::sm90
