// Tile kernels on CUDA: launched on the given stream of the current device, no synchronization,
// no allocation, no atomics on floats. Results are bitwise the same on every run.
#pragma once

#include <string>

#include "unitsface/permutation.h"
#include "unitsface/row_update.h"
#include "unitsface/tile_args.h"

namespace unitsface::cuda {

using SumTile = SumTileArgs<int64_t, float>;
using HistogramTile = HistogramTileArgs<int64_t>;
using PairNegatives = PairNegativesArgs<int64_t>;
using PairPositives = PairPositivesArgs<int64_t>;
using PairGradient = PairGradientArgs<int64_t>;

// Floats of workspace that a kernel needs for its partial sums.
int64_t sum_tile_workspace(int64_t n, int64_t m);
int64_t logsumexp_tile_workspace(int64_t n, int64_t m);
// Workspace of pair_negatives_tile and pair_positives_tile.
int64_t pair_statistics_workspace(int64_t n, int64_t m);

// `loss` is a name of loss_list.def, `params` its parameters on the host, `stream` a cudaStream_t.
// Throw std::invalid_argument for an unknown loss, std::runtime_error for a CUDA error.
void sum_tile(const std::string& loss, const float* params, const SumTile& args, float* workspace,
              void* stream);
void logsumexp_tile(const std::string& loss, const float* params, const LogsumexpTileArgs& args,
                    float* workspace, void* stream);
void logsumexp_gradient_tile(const std::string& loss, const float* params,
                             const LogsumexpGradientArgs& args, void* stream);
void positive_rows(const std::string& loss, const float* params, const float* cosine, int64_t n,
                   float* logit, float* slope, void* stream);
void pair_negatives_tile(const std::string& loss, const float* params, const PairNegatives& args,
                         float* workspace, void* stream);
void pair_positives_tile(const std::string& loss, const float* params, const PairPositives& args,
                         float* workspace, void* stream);
void pair_gradient_tile(const std::string& loss, const float* params, const PairGradient& args,
                        void* stream);
void normalize_rows(const NormalizeRowsArgs& args, void* stream);
void normalize_rows_backward(const NormalizeRowsBackwardArgs& args, void* stream);
// The only kernel with atomics; they are on integers, so that counts do not depend on the order.
void histogram_tile(const HistogramTile& args, void* stream);
void nearest_tile(const NearestTileArgs& args, void* stream);
void permuted(const PermutedArgs& args, void* stream);
void update_rows(const UpdateRowsArgs& args, void* stream);

// Number of usable devices; 0 with a reason if there is no driver or no device.
int device_count(std::string* reason);
// The reason why the current device cannot load the kernels of this build; "" if it can.
std::string image_failure();
// Architectures this build has machine code ("real") and PTX ("virtual") for, as CMake names them:
// "80-real,90-real,90-virtual".
std::string compiled_archs();

}  // namespace unitsface::cuda
