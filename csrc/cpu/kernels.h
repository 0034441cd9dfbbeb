// Tile kernels on the CPU, chosen at run time for the processor's instruction set.
#pragma once

#include <string>
#include <vector>

#include "cpu/loss_kernels.h"
#include "unitsface/permutation.h"
#include "unitsface/row_update.h"
#include "unitsface/tile_args.h"

namespace unitsface::cpu {

using HistogramTile = HistogramTileArgs<int32_t>;

// `count` GEMMs, kMostGemms at most, of which none reads or writes what another writes.
using Gemm = void (*)(const GemmArgs*, int64_t count, int threads);
constexpr size_t kMostGemms = 2;

// One instance per instruction set (isa.cpp). The split of the work is fixed: results do not depend
// on the number of threads.
struct Kernels {
  const char* isa;
  // Options of the compiler, for losses that are compiled at run time.
  const char* flags;
  // Those of a loss of loss_list.def; null for any other name.
  const LossKernels* (*of)(const char* loss);
  void (*normalize_rows)(const NormalizeRowsArgs&, int threads);
  void (*normalize_rows_backward)(const NormalizeRowsBackwardArgs&, int threads);
  void (*histogram_tile)(const HistogramTile&, int threads);
  void (*nearest_tile)(const NearestTileArgs&, int threads);
  void (*largest_of_centers)(const LargestOfCentersArgs&, int threads);
  void (*spread_over_centers)(const SpreadOverCentersArgs&, int threads);
  void (*absolute_sums)(const AbsoluteSumsArgs&, int threads);
  void (*permuted)(const PermutedArgs&, int threads);
  void (*update_rows)(const UpdateRowsArgs&, int threads);
  // Null where the set has no GEMM of that type.
  Gemm gemm_f32;
  Gemm gemm_bf16;
};

// The best set this processor runs, or the one named by UNITSFACE_CPU_ISA.
// Throws std::invalid_argument if that one is unknown or cannot run here.
const Kernels& kernels();

// The kernels of a loss: one of loss_list.def, or one that was registered; null: unknown.
const LossKernels* kernels_of(const std::string& loss);

// Makes known a loss compiled at run time. Its kernels are never unloaded.
// Throws std::invalid_argument if the name is one of loss_list.def.
void register_loss(const std::string& loss, const LossKernels* kernels);

// Whether the set has GEMMs of a type.
bool has_gemm(DType dtype);

// GEMMs of one type, see Gemm. False: the set has none of it.
bool multiply(const GemmArgs* gemms, size_t count, int threads);

// 32-bit words for the packed operands of the GEMMs that multiply() runs, aligned to 64 bytes.
uint32_t* gemm_workspace(int64_t words);

// Sets compiled into this build, and those this processor runs.
std::vector<std::string> compiled_isas();
std::vector<std::string> usable_isas();

}  // namespace unitsface::cpu
