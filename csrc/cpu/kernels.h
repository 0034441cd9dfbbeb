// Tile kernels on the CPU, chosen at run time for the processor's instruction set.
#pragma once

#include <string>
#include <vector>

#include "unitsface/permutation.h"
#include "unitsface/row_update.h"
#include "unitsface/tile_args.h"

namespace unitsface::cpu {

using SumTile = SumTileArgs<int32_t, double>;
using HistogramTile = HistogramTileArgs<int32_t>;
using PairNegatives = PairNegativesArgs<int32_t>;
using PairPositives = PairPositivesArgs<int32_t>;
using PairGradient = PairGradientArgs<int32_t>;

// One instance per instruction set (isa.cpp); `loss` is a name of loss_list.def, `params` its
// parameters. The split of the work is fixed: results do not depend on the number of threads.
struct Kernels {
  const char* isa;
  bool (*sum_tile)(const char* loss, const float* params, const SumTile&, int threads);
  bool (*logsumexp_tile)(const char* loss, const float* params, const LogsumexpTileArgs&,
                         int threads);
  bool (*logsumexp_gradient_tile)(const char* loss, const float* params,
                                  const LogsumexpGradientArgs&, int threads);
  bool (*positive_rows)(const char* loss, const float* params, const float* cosine, int64_t n,
                        float* logit, float* slope);
  void (*normalize_rows)(const NormalizeRowsArgs&, int threads);
  void (*normalize_rows_backward)(const NormalizeRowsBackwardArgs&, int threads);
  bool (*pair_negatives_tile)(const char* loss, const float* params, const PairNegatives&,
                              int threads);
  bool (*pair_positives_tile)(const char* loss, const float* params, const PairPositives&,
                              int threads);
  bool (*pair_gradient_tile)(const char* loss, const float* params, const PairGradient&,
                             int threads);
  void (*histogram_tile)(const HistogramTile&, int threads);
  void (*nearest_tile)(const NearestTileArgs&, int threads);
  void (*permuted)(const PermutedArgs&, int threads);
  void (*update_rows)(const UpdateRowsArgs&, int threads);
  // Null where the set has no GEMM of that type.
  void (*gemm_f32)(const GemmArgs&, int threads);
  void (*gemm_bf16)(const GemmArgs&, int threads);
};

// The best set this processor runs, or the one named by UNITSFACE_CPU_ISA.
// Throws std::invalid_argument if that one is unknown or cannot run here.
const Kernels& kernels();

// The set's GEMM of a type, or null, and the 32-bit words of workspace that it takes.
void (*gemm(DType dtype))(const GemmArgs&, int threads);
int64_t gemm_workspace(DType dtype, int64_t n, int64_t m, int64_t depth);

// Sets compiled into this build, and those this processor runs.
std::vector<std::string> compiled_isas();
std::vector<std::string> usable_isas();

}  // namespace unitsface::cpu
