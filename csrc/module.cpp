// The only pybind11 file. Tensors arrive as data pointers; Python (backends/native/engine.py)
// allocates, validates and keeps them alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#if defined(UF_WITH_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace unitsface {
namespace {

using Params = std::vector<float>;

void require(bool known, const std::string& loss) {
  if (!known) throw std::invalid_argument("no native policy for loss '" + loss + "'");
}

void require_nearest(const NearestTileArgs& args) {
  if (args.k < 1 || args.k > kMostNearest) {
    throw std::invalid_argument("nearest_tile: k must be in [1, " + std::to_string(kMostNearest) +
                                "], got " + std::to_string(args.k));
  }
}

void require_contiguous(const ProductArgs& args) {
  if ((args.a_row != 1 && args.a_depth != 1) || (args.b_row != 1 && args.b_depth != 1)) {
    throw std::invalid_argument("product: a stride of each operand must be 1");
  }
}

// Binds an argument struct: constructed from keywords, pointers given as integers.
template <class Args>
struct Fields {
  py::class_<Args> binding;

  Fields(py::module_& m, const char* name) : binding(m, name) {
    binding.def(py::init([](const py::kwargs& values) {
      auto args = std::make_unique<Args>();
      const py::object view = py::cast(args.get(), py::return_value_policy::reference);
      for (const auto& [name, value] : values) py::setattr(view, name, value);
      return args;
    }));
  }

  template <class T>
  Fields& operator()(const char* name, T Args::* member) {
    binding.def_property(
        name,
        [member](const Args& args) {
          if constexpr (std::is_pointer_v<T>) {
            return reinterpret_cast<std::uintptr_t>(args.*member);
          } else if constexpr (std::is_enum_v<T>) {
            return static_cast<int>(args.*member);
          } else {
            return args.*member;
          }
        },
        [member](Args& args, const py::object& value) {
          if constexpr (std::is_pointer_v<T>) {
            args.*member = reinterpret_cast<T>(value.cast<std::uintptr_t>());
          } else if constexpr (std::is_enum_v<T>) {
            args.*member = static_cast<T>(value.cast<int>());
          } else {
            args.*member = value.cast<T>();
          }
        });
    return *this;
  }
};

template <class Args>
void bind_sum_tile(py::module_& m, const char* name) {
  Fields<Args>(m, name)("product", &Args::product)("gradient", &Args::gradient)(
      "gradient_dtype", &Args::gradient_dtype)("gradient_scale", &Args::gradient_scale)(
      "n", &Args::n)("m", &Args::m)("stride", &Args::stride)("a_labels", &Args::a_labels)(
      "b_labels", &Args::b_labels)("a_threshold", &Args::a_threshold)(
      "b_threshold", &Args::b_threshold)("per_column", &Args::per_column)(
      "a_weights", &Args::a_weights)("b_weights", &Args::b_weights)("a_loss", &Args::a_loss)(
      "b_loss", &Args::b_loss)("a_dthreshold", &Args::a_dthreshold)(
      "b_dthreshold", &Args::b_dthreshold)("skip", &Args::skip)("mirrored", &Args::mirrored);
}

template <class Args>
void bind_histogram_tile(py::module_& m, const char* name) {
  Fields<Args>(m, name)("product", &Args::product)("n", &Args::n)("m", &Args::m)(
      "stride", &Args::stride)("a_labels", &Args::a_labels)("b_labels", &Args::b_labels)(
      "skip", &Args::skip)("upper", &Args::upper)("low", &Args::low)("scale", &Args::scale)(
      "bins", &Args::bins)("range_of_bin", &Args::range_of_bin)("ranges", &Args::ranges)(
      "slots", &Args::slots)("counts", &Args::counts)("per_row", &Args::per_row);
}

// What the tiles of a log-sum-exp loss over samples have in common.
template <class Args>
Fields<Args> pair_fields(py::module_& m, const std::string& name) {
  Fields<Args> fields(m, name.c_str());
  fields("product", &Args::product)("n", &Args::n)("m", &Args::m)("stride", &Args::stride)(
      "a_labels", &Args::a_labels)("b_labels", &Args::b_labels)("skip", &Args::skip);
  return fields;
}

template <class N, class P, class G>
void bind_pair_tiles(py::module_& m, const std::string& device) {
  pair_fields<N>(m, device + "PairNegatives")("a_maximum", &N::a_maximum)("a_total", &N::a_total)(
      "b_maximum", &N::b_maximum)("b_total", &N::b_total);
  pair_fields<P>(m, device + "PairPositives")("a_log_negatives", &P::a_log_negatives)(
      "a_loss", &P::a_loss)("a_share", &P::a_share)("b_log_negatives", &P::b_log_negatives)(
      "b_loss", &P::b_loss)("b_share", &P::b_share);
  pair_fields<G>(m, device + "PairGradient")("gradient", &G::gradient)(
      "gradient_dtype", &G::gradient_dtype)("gradient_scale", &G::gradient_scale)(
      "a_log_negatives", &G::a_log_negatives)("a_negative_weight", &G::a_negative_weight)(
      "a_positive_weight", &G::a_positive_weight)("b_log_negatives", &G::b_log_negatives)(
      "b_negative_weight", &G::b_negative_weight)("b_positive_weight", &G::b_positive_weight);
}

void bind_arguments(py::module_& m) {
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
  using L = LogsumexpTileArgs;
  Fields<L>(m, "LogsumexpTile")("product", &L::product)("n", &L::n)("m", &L::m)(
      "stride", &L::stride)("targets", &L::targets)("start", &L::start)("maximum", &L::maximum)(
      "total", &L::total)("target_cosine", &L::target_cosine);
  using G = LogsumexpGradientArgs;
  Fields<G>(m, "LogsumexpGradientTile")("product", &G::product)("gradient", &G::gradient)(
      "gradient_dtype", &G::gradient_dtype)("gradient_scale", &G::gradient_scale)("n", &G::n)(
      "m", &G::m)("stride", &G::stride)("targets", &G::targets)("start", &G::start)(
      "log_negatives", &G::log_negatives)("negative_weight", &G::negative_weight)(
      "target_gradient", &G::target_gradient);
  using K = NearestTileArgs;
  Fields<K>(m, "NearestTile")("product", &K::product)("n", &K::n)("m", &K::m)("stride", &K::stride)(
      "targets", &K::targets)("start", &K::start)("k", &K::k)("best", &K::best)(
      "position", &K::position)("target_cosine", &K::target_cosine);
  using U = UnitRowsArgs;
  Fields<U>(m, "UnitRows")("source", &U::source)("source_dtype", &U::source_dtype)(
      "index", &U::index)("start", &U::start)("n", &U::n)("d", &U::d)("unit", &U::unit)(
      "unit_dtype", &U::unit_dtype)("inverse_norms", &U::inverse_norms);
  using P = ProductArgs;
  Fields<P>(m, "Product")("a", &P::a)("b", &P::b)("dtype", &P::dtype)("n", &P::n)("m", &P::m)(
      "depth", &P::depth)("a_row", &P::a_row)("a_depth", &P::a_depth)("b_row", &P::b_row)(
      "b_depth", &P::b_depth)("out", &P::out)("stride", &P::stride)("add", &P::add)("scratch",
                                                                                    &P::scratch);
  using B = UnitRowsBackwardArgs;
  Fields<B>(m, "UnitRowsBackward")("d_unit", &B::d_unit)("source", &B::source)(
      "source_dtype", &B::source_dtype)("index", &B::index)("start", &B::start)("n", &B::n)(
      "d", &B::d)("inverse_norms", &B::inverse_norms)("out", &B::out)("out_dtype", &B::out_dtype)(
      "scale", &B::scale);
  using R = UpdateRowsArgs;
  Fields<R>(m, "UpdateRows")("weight", &R::weight)("gradient", &R::gradient)("index", &R::index)(
      "start", &R::start)("n", &R::n)("d", &R::d)("gradient_scale", &R::gradient_scale)(
      "rule", &R::rule)("step_size", &R::step_size)("weight_decay", &R::weight_decay)(
      "momentum", &R::momentum)("nesterov", &R::nesterov)("kept", &R::kept)(
      "one_minus_beta1", &R::one_minus_beta1)("beta2", &R::beta2)(
      "one_minus_beta2", &R::one_minus_beta2)("second_correction", &R::second_correction)(
      "eps", &R::eps)("first", &R::first)("second", &R::second);
  using T = PermutedArgs;
  Fields<T>(m, "Permuted")("key", &T::key)("size", &T::size)("classes", &T::classes)("n", &T::n)(
      "out", &T::out);
}

template <class Args>
void bind_cpu_pair_tile(py::module_& m, const char* name,
                        bool (*cpu::Kernels::*kernel)(const char*, const float*, const Args&,
                                                      int)) {
  m.def(
      name,
      [kernel](const std::string& loss, const Params& params, const Args& args, int threads) {
        require((cpu::kernels().*kernel)(loss.c_str(), params.data(), args, threads), loss);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_cpu(py::module_ m) {
  using Unlock = py::call_guard<py::gil_scoped_release>;
  m.def("isa", [] { return std::string(cpu::kernels().isa); });
  m.def("compiled_isas", &cpu::compiled_isas);
  m.def("usable_isas", &cpu::usable_isas);
  m.def(
      "sum_tile",
      [](const std::string& loss, const Params& params, const cpu::SumTile& args, int threads) {
        require(cpu::kernels().sum_tile(loss.c_str(), params.data(), args, threads), loss);
      },
      Unlock());
  m.def(
      "logsumexp_tile",
      [](const std::string& loss, const Params& params, const LogsumexpTileArgs& args,
         int threads) {
        require(cpu::kernels().logsumexp_tile(loss.c_str(), params.data(), args, threads), loss);
      },
      Unlock());
  m.def(
      "logsumexp_gradient_tile",
      [](const std::string& loss, const Params& params, const LogsumexpGradientArgs& args,
         int threads) {
        require(cpu::kernels().logsumexp_gradient_tile(loss.c_str(), params.data(), args, threads),
                loss);
      },
      Unlock());
  m.def(
      "positive_rows",
      [](const std::string& loss, const Params& params, std::uintptr_t cosine, int64_t n,
         std::uintptr_t logit, std::uintptr_t slope) {
        require(cpu::kernels().positive_rows(
                    loss.c_str(), params.data(), reinterpret_cast<const float*>(cosine), n,
                    reinterpret_cast<float*>(logit), reinterpret_cast<float*>(slope)),
                loss);
      },
      Unlock());
  m.def(
      "unit_rows",
      [](const UnitRowsArgs& args, int threads) { cpu::kernels().unit_rows(args, threads); },
      Unlock());
  m.def(
      "unit_rows_backward",
      [](const UnitRowsBackwardArgs& args, int threads) {
        cpu::kernels().unit_rows_backward(args, threads);
      },
      Unlock());
  m.def(
      "histogram_tile",
      [](const cpu::HistogramTile& args, int threads) {
        cpu::kernels().histogram_tile(args, threads);
      },
      Unlock());
  bind_cpu_pair_tile(m, "pair_negatives_tile", &cpu::Kernels::pair_negatives_tile);
  bind_cpu_pair_tile(m, "pair_positives_tile", &cpu::Kernels::pair_positives_tile);
  bind_cpu_pair_tile(m, "pair_gradient_tile", &cpu::Kernels::pair_gradient_tile);
  m.def(
      "nearest_tile",
      [](const NearestTileArgs& args, int threads) {
        require_nearest(args);
        cpu::kernels().nearest_tile(args, threads);
      },
      Unlock());
  m.def(
      "permuted",
      [](const PermutedArgs& args, int threads) { cpu::kernels().permuted(args, threads); },
      Unlock());
  m.def(
      "update_rows",
      [](const UpdateRowsArgs& args, int threads) { cpu::kernels().update_rows(args, threads); },
      Unlock());
  m.def("has_product",
        [](int dtype) { return cpu::product(static_cast<DType>(dtype)) != nullptr; });
  m.def("own_float32_products", &cpu::own_float32_products);
  m.def("product_scratch", [](int dtype, int64_t n, int64_t m, int64_t depth) {
    return cpu::product_scratch(static_cast<DType>(dtype), n, m, depth);
  });
  m.def(
      "product",
      [](const ProductArgs& args, int threads) {
        require_contiguous(args);
        const auto run = cpu::product(args.dtype);
        if (run == nullptr) {
          throw std::invalid_argument("product: not of this type in the instruction set " +
                                      std::string(cpu::kernels().isa));
        }
        run(args, threads);
      },
      Unlock());
}

#if defined(UF_WITH_CUDA)
float* floats(std::uintptr_t address) { return reinterpret_cast<float*>(address); }
void* handle(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

template <class Args>
void bind_cuda_pair_tile(py::module_& m, const char* name,
                         void (*kernel)(const std::string&, const float*, const Args&, float*,
                                        void*)) {
  m.def(
      name,
      [kernel](const std::string& loss, const Params& params, const Args& args,
               std::uintptr_t scratch, std::uintptr_t stream) {
        kernel(loss, params.data(), args, floats(scratch), handle(stream));
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_cuda(py::module_ m) {
  using Unlock = py::call_guard<py::gil_scoped_release>;
  m.def("device_count", [] {
    std::string reason;
    const int count = cuda::device_count(&reason);
    return std::make_pair(count, reason);
  });
  m.def("compiled_archs", &cuda::compiled_archs);
  m.def("sum_tile_scratch", &cuda::sum_tile_scratch);
  m.def("logsumexp_tile_scratch", &cuda::logsumexp_tile_scratch);
  m.def(
      "sum_tile",
      [](const std::string& loss, const Params& params, const cuda::SumTile& args,
         std::uintptr_t scratch, std::uintptr_t stream) {
        cuda::sum_tile(loss, params.data(), args, floats(scratch), handle(stream));
      },
      Unlock());
  m.def(
      "logsumexp_tile",
      [](const std::string& loss, const Params& params, const LogsumexpTileArgs& args,
         std::uintptr_t scratch, std::uintptr_t stream) {
        cuda::logsumexp_tile(loss, params.data(), args, floats(scratch), handle(stream));
      },
      Unlock());
  m.def(
      "logsumexp_gradient_tile",
      [](const std::string& loss, const Params& params, const LogsumexpGradientArgs& args,
         std::uintptr_t stream) {
        cuda::logsumexp_gradient_tile(loss, params.data(), args, handle(stream));
      },
      Unlock());
  m.def(
      "positive_rows",
      [](const std::string& loss, const Params& params, std::uintptr_t cosine, int64_t n,
         std::uintptr_t logit, std::uintptr_t slope, std::uintptr_t stream) {
        cuda::positive_rows(loss, params.data(), floats(cosine), n, floats(logit), floats(slope),
                            handle(stream));
      },
      Unlock());
  m.def(
      "unit_rows",
      [](const UnitRowsArgs& args, std::uintptr_t stream) {
        cuda::unit_rows(args, handle(stream));
      },
      Unlock());
  m.def(
      "unit_rows_backward",
      [](const UnitRowsBackwardArgs& args, std::uintptr_t stream) {
        cuda::unit_rows_backward(args, handle(stream));
      },
      Unlock());
  m.def(
      "histogram_tile",
      [](const cuda::HistogramTile& args, std::uintptr_t stream) {
        cuda::histogram_tile(args, handle(stream));
      },
      Unlock());
  m.def("pair_negatives_tile_scratch", &cuda::pair_statistics_scratch);
  m.def("pair_positives_tile_scratch", &cuda::pair_statistics_scratch);
  bind_cuda_pair_tile(m, "pair_negatives_tile", &cuda::pair_negatives_tile);
  bind_cuda_pair_tile(m, "pair_positives_tile", &cuda::pair_positives_tile);
  m.def(
      "pair_gradient_tile",
      [](const std::string& loss, const Params& params, const cuda::PairGradient& args,
         std::uintptr_t stream) {
        cuda::pair_gradient_tile(loss, params.data(), args, handle(stream));
      },
      Unlock());
  m.def(
      "nearest_tile",
      [](const NearestTileArgs& args, std::uintptr_t stream) {
        require_nearest(args);
        cuda::nearest_tile(args, handle(stream));
      },
      Unlock());
  m.def(
      "permuted",
      [](const PermutedArgs& args, std::uintptr_t stream) { cuda::permuted(args, handle(stream)); },
      Unlock());
  m.def(
      "update_rows",
      [](const UpdateRowsArgs& args, std::uintptr_t stream) {
        cuda::update_rows(args, handle(stream));
      },
      Unlock());
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Tile kernels of unitsface_kernels; see csrc/include/unitsface/tile_args.h.";
  m.attr("NO_SKIP") = INT64_MIN;
  bind_arguments(m);
  bind_cpu(m.def_submodule("cpu"));
#if defined(UF_WITH_CUDA)
  bind_cuda(m.def_submodule("cuda"));
#endif
}

}  // namespace unitsface
