// The CPU kernels of one loss, and what the extension and a loss compiled at run time must agree
// on.
#pragma once

#include <cstdint>

#include "cpu/pool.h"
#include "unitsface/tile_args.h"

namespace unitsface::cpu {

using SumTile = SumTileArgs<int32_t, double>;
struct PairNegatives : PairNegativesArgs<int32_t>, PairVariableArgs {};
struct PairPositives : PairPositivesArgs<int32_t>, PairVariableArgs {};
struct PairGradient : PairGradientArgs<int32_t>, PairVariableArgs {
  // Gradients of variables, added to: of both directions of a pair, or of that of the rows alone.
  // Null: not wanted.
  bool both_slopes = false;
  double* d_scalars = nullptr;   // [num_scalars]
  double* a_drows = nullptr;     // [num_rows, n], row_stride
  double* b_dcolumns = nullptr;  // [num_columns, m], column_stride
  double* b_drows = nullptr;     // [num_rows, m], row_stride
  double* a_dcolumns = nullptr;  // [num_columns, n], column_stride
};

// Null: the loss reduces in another way. `params` are the parameters of its policy. The split of
// the work is fixed: results do not depend on the number of threads.
struct LossKernels {
  int parameters;
  void (*sum_tile)(const float* params, const SumTile&, int threads);
  void (*logsumexp_tile)(const float* params, const LogsumexpTile&, int threads);
  void (*logsumexp_gradient_tile)(const float* params, const LogsumexpGradientTile&, int threads);
  void (*positive_rows)(const float* params, const float* cosine, int64_t n, float* logit,
                        float* slope);
  void (*pair_negatives_tile)(const float* params, const PairNegatives&, int threads);
  void (*pair_positives_tile)(const float* params, const PairPositives&, int threads);
  void (*pair_gradient_tile)(const float* params, const PairGradient&, int threads);
  int scalars, rows, columns;  // variables that its tiles read, see policy.h
};

using RunChunks = void (*)(int64_t count, int threads, RunChunk run, const void* body);

// What passes between the extension and a loss compiled at run time. The number is raised when the
// meaning of a field changes; sizes cover what is added.
constexpr int64_t loss_abi() {
  constexpr size_t sizes[] = {sizeof(LossKernels),   sizeof(SumTile),
                              sizeof(LogsumexpTile), sizeof(LogsumexpGradientTile),
                              sizeof(PairNegatives), sizeof(PairPositives),
                              sizeof(PairGradient)};
  int64_t abi = 2;
  for (const size_t size : sizes) abi = (abi * 1009 + static_cast<int64_t>(size)) % 1000000007;
  return abi;
}

}  // namespace unitsface::cpu
