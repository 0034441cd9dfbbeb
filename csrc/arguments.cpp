// Bindings of the kernels' argument structs, with the extent of the memory behind each pointer.
#include "cpu/kernels.h"
#include "fields.h"
#if defined(UF_WITH_CUDA)
#include "cuda/kernels.h"
#endif

namespace unitsface {
namespace {

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Elements of a matrix with a row stride; the last row may end with its last column.
int64_t strided(int64_t rows, int64_t columns, int64_t stride) {
  return rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns;
}

template <class Args>
int64_t tile(const Args& t) {
  return strided(t.n, t.m, t.stride);
}

template <class Args>
int64_t gradient_tile(const Args& t) {
  return tile(t) * size_of(t.gradient_dtype);
}

template <class Args>
int64_t rows(const Args& t) {
  return t.n;
}

template <class Args>
int64_t columns(const Args& t) {
  return t.m;
}

template <class Args>
int64_t row_variables(const Args& t) {
  return strided(t.num_rows, t.n, t.row_stride);
}

template <class Args>
int64_t column_variables(const Args& t) {
  return strided(t.num_columns, t.m, t.column_stride);
}

// Variables: policies that read none leave them out.
template <class Args>
void add_variables(Fields<Args>& fields) {
  fields.field("num_scalars", &Args::num_scalars)
      .field("num_rows", &Args::num_rows)
      .field("num_columns", &Args::num_columns)
      .field("row_stride", &Args::row_stride)
      .field("column_stride", &Args::column_stride)
      .field("scalars", &Args::scalars, [](const Args& t) { return t.num_scalars; })
      .field("a_rows", &Args::a_rows, row_variables)
      .field("b_columns", &Args::b_columns, column_variables)
      .check([](const Args& t) { return t.num_scalars >= 0 && t.num_rows >= 0; }, "numbers below 0")
      .check([](const Args& t) { return t.num_columns >= 0; }, "numbers below 0")
      .check([](const Args& t) { return t.row_stride >= 0 && t.column_stride >= 0; },
             "strides below 0");
}

template <class Args>
Fields<Args> variable_fields(Module& m, const char* name) {
  Fields<Args> fields(m, name);
  add_variables(fields);
  return fields;
}

template <class Args>
int64_t other_row_variables(const Args& t) {
  return strided(t.num_rows, t.m, t.row_stride);
}

template <class Args>
int64_t other_column_variables(const Args& t) {
  return strided(t.num_columns, t.n, t.column_stride);
}

// As the other direction of pairs reads them, which a tile has or not.
template <class Args>
void add_other_variables(Fields<Args>& fields) {
  fields.optional("b_rows", &Args::b_rows, other_row_variables)
      .optional("a_columns", &Args::a_columns, other_column_variables);
}

template <class Args>
bool has_other_variables(const Args& t, bool directions) {
  if (t.n == 0 || t.m == 0 || !directions) return true;
  return (t.num_rows == 0 || t.b_rows != nullptr) && (t.num_columns == 0 || t.a_columns != nullptr);
}

constexpr const char* kOtherVariables = "variables of the other direction are missing";

template <class Args>
void add_gradients_of_variables(Fields<Args>& fields) {
  fields.optional("a_drows", &Args::a_drows, row_variables)
      .optional("d_scalars", &Args::d_scalars, [](const Args& t) { return t.num_scalars; })
      .optional("b_dcolumns", &Args::b_dcolumns, column_variables)
      .optional("b_drows", &Args::b_drows, other_row_variables)
      .optional("a_dcolumns", &Args::a_dcolumns, other_column_variables);
}

template <class Args>
void bind_sum_tile(Module& m, const char* name) {
  auto fields = variable_fields<Args>(m, name);
  add_other_variables(fields);
  add_gradients_of_variables(fields);
  fields
      .check(
          [](const Args& t) { return has_other_variables(t, t.mirrored || t.b_loss != nullptr); },
          kOtherVariables)
      .field("cosines", &Args::cosines, tile)
      .optional("gradient", &Args::gradient, gradient_tile)
      .field("gradient_dtype", &Args::gradient_dtype)
      .field("gradient_scale", &Args::gradient_scale)
      .field("n", &Args::n)
      .field("m", &Args::m)
      .field("stride", &Args::stride)
      .field("a_labels", &Args::a_labels, rows)
      .field("b_labels", &Args::b_labels, columns)
      .optional("a_threshold", &Args::a_threshold,
                [](const Args& t) { return t.per_column ? t.n : 0; })
      .field("b_threshold", &Args::b_threshold,
             [](const Args& t) { return t.per_column || t.m == 0 ? t.m : 1; })
      .field("per_column", &Args::per_column)
      .optional("a_weights", &Args::a_weights, rows)
      .optional("b_weights", &Args::b_weights, columns)
      .field("a_loss", &Args::a_loss, rows)
      .optional("b_loss", &Args::b_loss, columns)
      .optional("a_dthreshold", &Args::a_dthreshold,
                [](const Args& t) { return t.per_column && t.b_loss != nullptr ? t.n : 0; })
      .optional("b_dthreshold", &Args::b_dthreshold,
                [](const Args& t) { return t.per_column ? t.m : 1; })
      .field("diagonal", &Args::diagonal)
      .field("mirrored", &Args::mirrored)
      .check(
          [](const Args& t) {
            const bool both = t.per_column && t.n > 0 && (t.mirrored || t.b_loss != nullptr);
            return !both || t.a_threshold != nullptr;
          },
          "a_threshold is missing")
      .check(
          [](const Args& t) {
            const bool both = t.per_column && t.n > 0 && t.b_loss != nullptr;
            return !both || t.b_dthreshold == nullptr || t.a_dthreshold != nullptr;
          },
          "a_dthreshold is missing");
}

template <class Args>
void bind_histogram_tile(Module& m, const char* name) {
  Fields<Args>(m, name)
      .field("cosines", &Args::cosines, tile)
      .field("n", &Args::n)
      .field("m", &Args::m)
      .field("stride", &Args::stride)
      .field("a_labels", &Args::a_labels, rows)
      .field("b_labels", &Args::b_labels, columns)
      .field("diagonal", &Args::diagonal)
      .field("upper", &Args::upper)
      .field("low", &Args::low)
      .field("scale", &Args::scale)
      .field("bins", &Args::bins)
      .optional("range_of_bin", &Args::range_of_bin, [](const Args& t) { return t.bins + 3; })
      .field("ranges", &Args::ranges)
      .field("slots", &Args::slots)
      .field("counts", &Args::counts,
             [](const Args& t) { return (t.per_row ? t.n : 1) * 2 * t.slots; })
      .field("per_row", &Args::per_row)
      .check(
          [](const Args& t) { return t.range_of_bin != nullptr || t.slots >= t.bins + 3 || !t.m; },
          "slots are fewer than bins + 3");
}

template <class Args>
Fields<Args> pair_fields(Module& m, const std::string& name) {
  Fields<Args> fields(m, name.c_str());
  if constexpr (std::is_base_of_v<VariableArgs, Args>) {
    add_variables(fields);
    add_other_variables(fields);
  }
  fields.field("cosines", &Args::cosines, tile)
      .field("n", &Args::n)
      .field("m", &Args::m)
      .field("stride", &Args::stride)
      .field("a_labels", &Args::a_labels, rows)
      .field("b_labels", &Args::b_labels, columns)
      .field("diagonal", &Args::diagonal);
  return fields;
}

template <class N, class P, class G>
void bind_pair_tiles(Module& m, const std::string& device) {
  auto negatives = pair_fields<N>(m, device + "PairNegatives");
  auto positives = pair_fields<P>(m, device + "PairPositives");
  auto gradient = pair_fields<G>(m, device + "PairGradient");
  if constexpr (std::is_base_of_v<VariableArgs, G>) {
    add_gradients_of_variables(gradient);
    gradient.field("both_slopes", &G::both_slopes)
        .check([](const G& t) { return !t.both_slopes || t.b_log_negatives != nullptr; },
               "gradients of both directions need weights of both")
        .check([](const G& t) { return has_other_variables(t, t.b_log_negatives != nullptr); },
               kOtherVariables);
    negatives.check([](const N& t) { return has_other_variables(t, t.b_maximum != nullptr); },
                    kOtherVariables);
    positives.check([](const P& t) { return has_other_variables(t, t.b_loss != nullptr); },
                    kOtherVariables);
  }
  negatives.field("a_maximum", &N::a_maximum, rows)
      .field("a_total", &N::a_total, rows)
      .optional("b_maximum", &N::b_maximum, columns)
      .optional("b_total", &N::b_total, columns)
      .optional("a_positive_maximum", &N::a_positive_maximum, rows)
      .optional("a_positive_total", &N::a_positive_total, rows)
      .optional("b_positive_maximum", &N::b_positive_maximum, columns)
      .optional("b_positive_total", &N::b_positive_total, columns)
      .check([](const N& t) { return (t.b_maximum == nullptr) == (t.b_total == nullptr); },
             "b_maximum and b_total go together")
      .check(
          [](const N& t) {
            return (t.a_positive_maximum == nullptr) == (t.a_positive_total == nullptr) &&
                   (t.b_positive_maximum == nullptr) == (t.b_positive_total == nullptr);
          },
          "positive_maximum and positive_total go together");
  positives.field("a_log_negatives", &P::a_log_negatives, rows)
      .field("a_loss", &P::a_loss, rows)
      .field("a_negative_prob", &P::a_negative_prob, rows)
      .optional("b_log_negatives", &P::b_log_negatives, columns)
      .optional("b_loss", &P::b_loss, columns)
      .optional("b_negative_prob", &P::b_negative_prob, columns)
      .check(
          [](const P& t) {
            return t.b_loss == nullptr ||
                   (t.b_negative_prob != nullptr && t.b_log_negatives != nullptr);
          },
          "b_log_negatives, b_loss and b_negative_prob go together");
  gradient.field("gradient", &G::gradient, gradient_tile)
      .field("gradient_dtype", &G::gradient_dtype)
      .field("gradient_scale", &G::gradient_scale)
      .field("a_log_negatives", &G::a_log_negatives, rows)
      .field("a_negative_weight", &G::a_negative_weight, rows)
      .field("a_positive_weight", &G::a_positive_weight, rows)
      .optional("b_log_negatives", &G::b_log_negatives, columns)
      .optional("b_negative_weight", &G::b_negative_weight, columns)
      .optional("b_positive_weight", &G::b_positive_weight, columns)
      .optional("a_log_positives", &G::a_log_positives, rows)
      .optional("b_log_positives", &G::b_log_positives, columns)
      .check(
          [](const G& t) {
            const bool none = t.b_log_negatives == nullptr;
            return (t.b_negative_weight == nullptr) == none &&
                   (t.b_positive_weight == nullptr) == none;
          },
          "b_log_negatives and weights go together");
}

// Extent of the rows that are addressed without an index.
template <class Args>
bool inside(const Args& t) {
  return t.n == 0 || t.index != nullptr || (t.start >= 0 && t.start + t.n <= t.rows);
}

}  // namespace

void bind_arguments(Module& m) {
  bind_histogram_tile<cpu::HistogramTile>(m, "CpuHistogramTile");
#if defined(UF_WITH_CUDA)
  bind_histogram_tile<cuda::HistogramTile>(m, "CudaHistogramTile");
#endif
  bind_sum_tile<cpu::SumTile>(m, "CpuSumTile");
  bind_pair_tiles<cpu::PairNegatives, cpu::PairPositives, cpu::PairGradient>(m, "Cpu");
#if defined(UF_WITH_CUDA)
  bind_sum_tile<cuda::SumTile>(m, "CudaSumTile");
  bind_pair_tiles<cuda::PairNegatives, cuda::PairPositives, cuda::PairGradient>(m, "Cuda");
#endif
  using L = LogsumexpTile;
  variable_fields<L>(m, "LogsumexpTile")
      .field("cosines", &L::cosines, tile)
      .field("n", &L::n)
      .field("m", &L::m)
      .field("stride", &L::stride)
      .field("targets", &L::targets, rows)
      .field("start", &L::start)
      .field("maximum", &L::maximum, rows)
      .field("total", &L::total, rows)
      .field("target_cosine", &L::target_cosine, rows);
  using G = LogsumexpGradientTile;
  variable_fields<G>(m, "LogsumexpGradientTile")
      .optional("a_drows", &G::a_drows, row_variables)
      .optional("a_dscalars", &G::a_dscalars,
                [](const G& t) { return strided(t.num_scalars, t.n, t.row_stride); })
      .optional("b_dcolumns", &G::b_dcolumns, column_variables)
      .field("cosines", &G::cosines, tile)
      .field("gradient", &G::gradient, gradient_tile)
      .field("gradient_dtype", &G::gradient_dtype)
      .field("gradient_scale", &G::gradient_scale)
      .field("n", &G::n)
      .field("m", &G::m)
      .field("stride", &G::stride)
      .field("targets", &G::targets, rows)
      .field("start", &G::start)
      .field("log_negatives", &G::log_negatives, rows)
      .field("negative_weight", &G::negative_weight, rows)
      .field("target_gradient", &G::target_gradient, rows);
  using K = NearestTileArgs;
  Fields<K>(m, "NearestTile")
      .field("cosines", &K::cosines, tile)
      .field("n", &K::n)
      .field("m", &K::m)
      .field("stride", &K::stride)
      .field("targets", &K::targets, rows)
      .field("start", &K::start)
      .field("k", &K::k)
      .field("best", &K::best, [](const K& t) { return t.n * t.k; })
      .field("position", &K::position, [](const K& t) { return t.n * t.k; })
      .field("target_cosine", &K::target_cosine, rows);
  using O = LargestOfCentersArgs;
  Fields<O>(m, "LargestOfCenters")
      .field("products", &O::products, [](const O& t) { return t.n * t.m * t.k; })
      .field("n", &O::n)
      .field("m", &O::m)
      .field("k", &O::k)
      .field("cosines", &O::cosines, [](const O& t) { return t.n * t.m; })
      .field("which", &O::which, [](const O& t) { return t.n * t.m; });
  using S = SpreadOverCentersArgs;
  Fields<S>(m, "SpreadOverCenters")
      .field("gradient", &S::gradient, [](const S& t) { return t.n * t.m * size_of(t.dtype); })
      .field("dtype", &S::dtype)
      .field("which", &S::which, [](const S& t) { return t.n * t.m; })
      .field("n", &S::n)
      .field("m", &S::m)
      .field("k", &S::k)
      .field("out", &S::out, [](const S& t) { return t.n * t.m * t.k * size_of(t.dtype); });
  using A = AbsoluteSumsArgs;
  Fields<A>(m, "AbsoluteSums")
      .field("tile", &A::tile, [](const A& t) { return t.n * t.m * size_of(t.dtype); })
      .field("dtype", &A::dtype)
      .field("n", &A::n)
      .field("m", &A::m)
      .field("by_column", &A::by_column)
      .field("sums", &A::sums, [](const A& t) { return t.by_column ? t.m : t.n; });
  using U = NormalizeRowsArgs;
  Fields<U>(m, "NormalizeRows")
      .field("source", &U::source,
             [](const U& t) { return t.rows * t.d * size_of(t.source_dtype); })
      .field("source_dtype", &U::source_dtype)
      .optional("index", &U::index, rows)
      .field("start", &U::start)
      .field("n", &U::n)
      .field("d", &U::d)
      .field("unit", &U::unit, [](const U& t) { return t.n * t.d * size_of(t.unit_dtype); })
      .field("unit_dtype", &U::unit_dtype)
      .field("inverse_norms", &U::inverse_norms, rows)
      .field("rows", &U::rows)
      .check(inside, "rows are outside the source");
  using B = NormalizeRowsBackwardArgs;
  Fields<B>(m, "NormalizeRowsBackward")
      .field("d_unit", &B::d_unit, [](const B& t) { return t.n * t.d; })
      .field("source", &B::source,
             [](const B& t) { return t.rows * t.d * size_of(t.source_dtype); })
      .field("source_dtype", &B::source_dtype)
      .optional("index", &B::index, rows)
      .field("start", &B::start)
      .field("n", &B::n)
      .field("d", &B::d)
      .field("inverse_norms", &B::inverse_norms, rows)
      .field("out", &B::out, [](const B& t) { return t.n * t.d * size_of(t.out_dtype); })
      .field("out_dtype", &B::out_dtype)
      .optional("scale", &B::scale, [](const B&) -> int64_t { return 1; })
      .field("rows", &B::rows)
      .check(inside, "rows are outside the source");
  using R = UpdateRowsArgs;
  const auto matrix = [](const R& t) { return t.rows * t.d; };
  Fields<R>(m, "UpdateRows")
      .field("weight", &R::weight, matrix)
      .field("gradient", &R::gradient, [](const R& t) { return t.n * t.d; })
      .optional("index", &R::index, rows)
      .field("start", &R::start)
      .field("n", &R::n)
      .field("d", &R::d)
      .optional("gradient_scale", &R::gradient_scale, [](const R&) -> int64_t { return 1; })
      .field("rule", &R::rule)
      .field("step_size", &R::step_size)
      .field("weight_decay", &R::weight_decay)
      .field("momentum", &R::momentum)
      .field("nesterov", &R::nesterov)
      .field("kept", &R::kept)
      .field("one_minus_beta1", &R::one_minus_beta1)
      .field("beta2", &R::beta2)
      .field("one_minus_beta2", &R::one_minus_beta2)
      .field("second_correction", &R::second_correction)
      .field("eps", &R::eps)
      .optional("first", &R::first, matrix)
      .optional("second", &R::second, matrix)
      .field("rows", &R::rows)
      .check(inside, "rows are outside the weight")
      .check([](const R& t) { return t.rule != RowRule::kAdamW || (t.first && t.second); },
             "AdamW has two states");
  using T = PermutedArgs;
  Fields<T>(m, "Permuted")
      .field("key", &T::key)
      .field("size", &T::size)
      .optional("classes", &T::classes, rows)
      .optional("positives", &T::positives, [](const T& t) { return t.m; })
      .field("m", &T::m)
      .field("n", &T::n)
      .field("out", &T::out, rows)
      .check(
          [](const T& t) {
            const bool places = t.classes == nullptr && static_cast<uint64_t>(t.n) > t.size;
            const bool positives = t.m == 0 || (t.m > 0 && t.positives != nullptr);
            return t.n == 0 || (!places && positives && t.size <= uint64_t{1} << 62);
          },
          "more places than classes, or no positives");
}

}  // namespace unitsface
