// Sums that leave the blocks of a kernel as partials, which a second kernel adds up in a fixed
// order.
#pragma once

#include "common.cuh"
#include "kernels.h"

namespace unitsface::cuda {

// Null: not computed.
struct SumPartials {
  float* row_loss;           // [column_blocks, n]
  float* row_dthreshold;     // [column_blocks, n]
  float* column_loss;        // [row_blocks, m]
  float* column_dthreshold;  // [row_blocks, m], or [blocks] for a scalar threshold
  unsigned column_blocks;
  int64_t block_rows;
};

// Of the sums that `args` has; `workspace` has sum_tile_workspace floats, or as many with other
// numbers of blocks.
SumPartials sum_partials(const SumTile& args, float* workspace, int64_t column_blocks,
                         int64_t row_blocks, int64_t block_rows);
void add_partials(const SumPartials& partials, const SumTile& args, int64_t column_blocks,
                  int64_t row_blocks, void* stream);

// Two numbers per row or column, interpreted by LogSums or PlainSums.
struct Statistic {
  float first, second;
};

// exp(z - shift) is 0 for z = -inf, even if every value so far was -inf.
UF_HOST_DEVICE float shift_of(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// A maximum and the sum of exp(z - maximum). The sum carries NaN, which fmaxf drops.
struct LogSums {
  static UF_HOST_DEVICE Statistic none() { return {-INFINITY, 0.0f}; }
  static UF_HOST_DEVICE Statistic fold(Statistic a, Statistic b) {
    const float maximum = fmaxf(a.first, b.first);
    const float shift = shift_of(maximum);
    return {maximum, a.second * expf(a.first - shift) + b.second * expf(b.first - shift)};
  }
};

struct PlainSums {
  static UF_HOST_DEVICE Statistic none() { return {0.0f, 0.0f}; }
  static UF_HOST_DEVICE Statistic fold(Statistic a, Statistic b) {
    return {a.first + b.first, a.second + b.second};
  }
};

// Partials of one direction: [segments, length] of the first numbers, then of the second.
struct Partials {
  float* data;
  int64_t segments, length;

  UF_HOST_DEVICE void write(int64_t segment, int64_t position, Statistic value) const {
    data[segment * length + position] = value.first;
    data[(segments + segment) * length + position] = value.second;
  }
  UF_HOST_DEVICE Statistic read(int64_t segment, int64_t position) const {
    return {data[segment * length + position], data[(segments + segment) * length + position]};
  }
};

// Folds them into the running values (LogSums), or adds them (PlainSums).
template <class Fold>
void fold_partials(const Partials& partials, float* first, float* second, void* stream);

}  // namespace unitsface::cuda
