// Arguments of the tile kernels; the same for CPU and CUDA.
//
// A tile holds the cosines of n rows with m columns, row-major, row i at cosines + i * stride.
// Pointers are to host memory for CPU kernels and to device memory for CUDA kernels.
// unitsface_kernels/backends/streaming/engine.py defines labels, targets and statistics.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace unitsface {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The element type of labels and of the statistics differs: the CPU compares 32-bit identities
// (twice as many per vector) and accumulates in double, CUDA takes the user's 64 bits and float.
template <class Label, class Stat>
struct SumTileArgs {
  const float* cosines;  // [n, m], stride
  void* gradient;        // [n, m] d loss / d cosine, stride; null: none. May be cosines.
  DType gradient_dtype;
  float gradient_scale;  // factor of what is stored in gradient (for float16)
  int64_t n, m, stride;
  const Label* a_labels;     // [n], < 0: ignored
  const Label* b_labels;     // [m]
  const float* a_threshold;  // per_column: [n], null if the tile serves its rows only; else unused
  const float* b_threshold;  // per_column: [m]; else [1]
  bool per_column;
  const float* a_weights;  // [n] or null: ones
  const float* b_weights;  // [m] or null: ones
  Stat* a_loss;            // [n], added to
  Stat* b_loss;            // [m], added to; null: the tile serves its rows only
  Stat* a_dthreshold;      // per_column: [n], added to if b_loss; else unused
  Stat* b_dthreshold;      // per_column: [m], added to; else [1], added to; null: not wanted
  int64_t diagonal;        // the pair (i, i + diagonal) is left out; INT64_MIN: none
  bool mirrored;           // the gradient counts both directions of a pair
  // Variables of a policy (policy.h): as many as it has, and their values. Matrices have a row for
  // each variable.
  int64_t num_scalars = 0, num_rows = 0, num_columns = 0;
  int64_t row_stride = 0, column_stride = 0;  // of matrices of row and of column variables
  const float* scalars = nullptr;             // [num_scalars]
  const float* a_rows = nullptr;              // [num_rows, n], row_stride
  const float* b_columns = nullptr;           // [num_columns, m], column_stride
  // As the other direction reads them, if mirrored.
  const float* b_rows = nullptr;     // [num_rows, m], row_stride
  const float* a_columns = nullptr;  // [num_columns, n], column_stride
  // Their gradients, added to; with b_loss, of both directions. Null: not wanted.
  Stat* d_scalars = nullptr;
  Stat* a_drows = nullptr;
  Stat* b_dcolumns = nullptr;
  Stat* b_drows = nullptr;
  Stat* a_dcolumns = nullptr;
};

struct LogsumexpTileArgs {
  float* cosines;  // [n, m], stride; the CPU writes to it on the way and restores it
  int64_t n, m, stride;
  const int64_t* targets;  // [n], position among all columns
  int64_t start;           // position of the tile's first column
  float* maximum;          // [n]
  float* total;            // [n]
  float* target_cosine;    // [n]
};

struct LogsumexpGradientArgs {
  const float* cosines;  // [n, m], stride
  void* gradient;        // [n, m], stride; may be cosines
  DType gradient_dtype;
  float gradient_scale;
  int64_t n, m, stride;
  const int64_t* targets;
  int64_t start;
  const float* log_negatives;    // [n]
  const float* negative_weight;  // [n]; 0: the row's gradient is 0 for any cosines
  const float* target_gradient;  // [n]
};

// Variables of a policy (policy.h) as tiles of the CPU read them: as many as it has, and their
// values. Matrices have a row for each variable. Kernels of a GPU have no more arguments than they
// read.
struct VariableArgs {
  int64_t num_scalars = 0, num_rows = 0, num_columns = 0;
  int64_t row_stride = 0, column_stride = 0;  // of matrices of row and of column variables
  const float* scalars = nullptr;             // [num_scalars]
  const float* a_rows = nullptr;              // [num_rows, n], row_stride
  const float* b_columns = nullptr;           // [num_columns, m], column_stride
};

struct LogsumexpTile : LogsumexpTileArgs, VariableArgs {};

struct LogsumexpGradientTile : LogsumexpGradientArgs, VariableArgs {
  // Their gradients of the negatives, added to; null: not wanted.
  double* a_dscalars = nullptr;  // [num_scalars, n], row_stride: each row's share
  double* a_drows = nullptr;     // [num_rows, n], row_stride
  double* b_dcolumns = nullptr;  // [num_columns, m], column_stride
};

// Variables of a tile of pairs of samples; null for the other direction if it has none.
struct PairVariableArgs : VariableArgs {
  const float* b_rows = nullptr;     // [num_rows, m], row_stride
  const float* a_columns = nullptr;  // [num_columns, n], column_stride
};

// A range of scores that a refining pass counts in sub-bins of 2^shift neighboring float32 values.
struct ScoreRange {
  int64_t low;    // score_key of its lowest value
  int64_t size;   // values in it, < 2^32
  int64_t shift;  // 2^shift values to a sub-bin
  int64_t first;  // place of its first sub-bin among the counters
};

// Counts a tile's cosines of positive (equal labels) and of negative pairs.
//
// Bins (histogram_bin.h): 0 below low, 1 ... bins, bins + 1 from the high end on, bins + 2 NaN;
// that makes `slots` = bins + 3 counters. With ranges, only cosines in one of these are counted, in
// its sub-bins; `slots` is then the sum of theirs. n * m < 2^32.
template <class Label>
struct HistogramTileArgs {
  const float* cosines;  // [n, m], stride
  int64_t n, m, stride;
  const Label* a_labels;  // [n], < 0: ignored
  const Label* b_labels;  // [m]
  int64_t diagonal;       // the pair (i, i + diagonal) is left out; INT64_MIN: none
  bool upper;             // only pairs (i, j) with j > i + diagonal
  float low, scale;       // bin of c: floor((c - low) * scale)
  int64_t bins;
  const int32_t* range_of_bin;  // [bins + 3], -1: no range; null: bins are counted, not ranges
  const ScoreRange* ranges;     // at most one within a bin
  int64_t slots;
  int64_t* counts;  // [2, slots], positives first, added to
  bool per_row;     // counts is [n, 2, slots]
};

// Tiles of a log-sum-exp loss over samples. If the columns' pointers are null, the tile serves its
// rows only; otherwise each pair counts in both directions. The same of positives is for losses of
// two log-sum-exps (UF_PAIR_LOGSUMEXPS_LOSS), and null for the others.
template <class Label>
struct PairNegativesArgs {
  float* cosines;  // [n, m], stride; may be overwritten
  int64_t n, m, stride;
  const Label* a_labels;       // [n], < 0: ignored
  const Label* b_labels;       // [m]
  int64_t diagonal;            // the pair (i, i + diagonal) is left out; INT64_MIN: none
  float *a_maximum, *a_total;  // [n]
  float *b_maximum, *b_total;  // [m] or null
  float *a_positive_maximum, *a_positive_total;  // [n] or null
  float *b_positive_maximum, *b_positive_total;  // [m] or null
};

template <class Label>
struct PairPositivesArgs {
  const float* cosines;
  int64_t n, m, stride;
  const Label* a_labels;
  const Label* b_labels;
  int64_t diagonal;
  const float* a_log_negatives;     // [n]
  float *a_loss, *a_negative_prob;  // [n], added to: softplus and sigmoid of (log_negatives - z)
  const float* b_log_negatives;     // [m] or null
  float *b_loss, *b_negative_prob;  // [m] or null
};

template <class Label>
struct PairGradientArgs {
  const float* cosines;
  void* gradient;  // [n, m], stride; may be cosines
  DType gradient_dtype;
  float gradient_scale;
  int64_t n, m, stride;
  const Label* a_labels;
  const Label* b_labels;
  int64_t diagonal;
  // For a row with log-sum-exp N, a negative's gradient is negative_weight exp(z - N) dz/dc, a
  // positive's -positive_weight sigmoid(N - z) dz/dc or, where there is a log-sum-exp P of
  // positives, positive_weight exp(z - P) dz/dc. +inf with weights 0 takes a row out.
  const float *a_log_negatives, *a_negative_weight, *a_positive_weight;  // [n]
  const float *b_log_negatives, *b_negative_weight, *b_positive_weight;  // [m] or null
  const float *a_log_positives, *b_log_positives;                        // as the two above
};

// What a loss of two log-sum-exps needs beside the others.
inline void require_positives(bool there) {
  if (!there) throw std::invalid_argument("the log-sum-exps of positives are missing");
}

template <class Label>
void require_positives(const PairNegativesArgs<Label>& t) {
  require_positives((t.n == 0 || t.a_positive_maximum != nullptr) &&
                    (t.b_maximum == nullptr || t.b_positive_maximum != nullptr));
}

template <class Label>
void require_positives(const PairGradientArgs<Label>& t) {
  require_positives((t.n == 0 || t.a_log_positives != nullptr) &&
                    (t.b_log_negatives == nullptr || t.b_log_positives != nullptr));
}

// Folds a tile into the top-k cosines of each row, over columns that are not its target. NaN is
// ordered before every number, and of equal cosines the smaller position comes first.
struct NearestTileArgs {
  float* cosines;  // [n, m], stride; may be overwritten
  int64_t n, m, stride;
  const int64_t* targets;  // [n], position among all columns
  int64_t start;           // position of the tile's first column; positions are below 2^31
  int64_t k;               // 1 ... kMostNearest
  float* best;             // [n, k], in the order of the search; -inf: unfilled
  int32_t* position;       // [n, k] among all columns; -1: unfilled
  float* target_cosine;    // [n]
};

constexpr int64_t kMostNearest = 64;

// Products with m classes of k centers each, side by side: the largest of each class and its place.
// The first of equal ones, and the first NaN, if there is one.
struct LargestOfCentersArgs {
  const float* products;  // [n, m * k]
  int64_t n, m, k;        // 1 <= k <= kMostCenters
  float* cosines;         // [n, m]
  uint8_t* which;         // [n, m]
};

// out[i, j * k + which[i, j]] = gradient[i, j], and 0 elsewhere.
struct SpreadOverCentersArgs {
  const void* gradient;  // [n, m]
  DType dtype;           // of gradient and out
  const uint8_t* which;  // [n, m], below k
  int64_t n, m, k;
  void* out;  // [n, m * k]
};

constexpr int64_t kMostCenters = 256;

// Sums of |tile|, of a row or of a column each.
struct AbsoluteSumsArgs {
  const void* tile;  // [n, m]
  DType dtype;
  int64_t n, m;
  bool by_column;
  float* sums;  // [m] by column, else [n]
};

// unit = source[index] / max(norm, 1e-5), inverse_norms = 1 / max(norm, 1e-5). Both are NaN for a
// row with an element that is not finite.
struct NormalizeRowsArgs {
  const void* source;  // [rows, d]
  DType source_dtype;
  const int64_t* index;  // [n] rows of source, or null: rows start ... start + n - 1
  int64_t start, n, d;
  void* unit;  // [n, d]
  DType unit_dtype;
  float* inverse_norms;  // [n]
  int64_t rows;          // of source
};

// out = scale r (g - <g, u> u), without the second term where the norm was clamped.
struct NormalizeRowsBackwardArgs {
  const float* d_unit;  // [n, d]
  const void* source;
  DType source_dtype;
  const int64_t* index;
  int64_t start, n, d;
  const float* inverse_norms;
  void* out;  // [n, d]; may be d_unit if both are float32
  DType out_dtype;
  const float* scale;  // [1] or null
  int64_t rows;        // of source
};

// out[i, j] = sum over k < depth of a[i, k] b[j, k], summed in float32. Operands are float32 or
// bfloat16; a[i, k] is at a + i * a_row + k * a_depth, one of which is 1, and b likewise.
struct GemmArgs {
  const void *a, *b;  // [n, depth], [m, depth]
  DType dtype;
  int64_t n, m, depth;
  int64_t a_row, a_depth;
  int64_t b_row, b_depth;
  float* out;  // [n, m], stride
  int64_t stride;
  bool add;  // to what is in out
};

// Smaller norms are clamped to this.
constexpr float kNormEps = 1e-5f;
// Rows whose squares overflow are multiplied by this first: 2^-70.
constexpr float kShrink = 8.470329472543003e-22f;
// Below this inverse norm, multiplying it by a gradient might overflow.
constexpr float kSmallInverse = 1e-12f;

}  // namespace unitsface
