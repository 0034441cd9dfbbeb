// Kernels that multiply and run the policy on the products, which never reach memory. Arguments are
// those of ../kernels.h with `cosines` ignored; launches, errors and results likewise.
#pragma once

#include <string>

#include "../kernels.h"
#include "operands.h"

namespace unitsface::cuda {

int64_t fused_sum_tile_workspace(int64_t n, int64_t m);

void fused_sum_tile(const std::string& loss, const float* params, const FusedOperands& operands,
                    const SumTile& args, float* workspace, void* stream);

}  // namespace unitsface::cuda
