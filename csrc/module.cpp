// The functions of the extension. Tensors arrive as addresses and bytes; Python
// (backends/native/engine.py) allocates and keeps them alive.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "fields.h"
#if defined(UF_WITH_CUDA)
#include "cuda/kernels.h"
#endif

namespace unitsface {

void bind_arguments(py::module_& m);

namespace {

using Params = std::vector<float>;

// Policies read as many as they have: what is missing is 0.
constexpr size_t kMostParameters = 16;

const float* numbers(Params& params) {
  if (params.size() < kMostParameters) params.resize(kMostParameters, 0.0f);
  return params.data();
}

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

float* floats(const Span& span, int64_t count) {
  if (span.second < count * static_cast<int64_t>(sizeof(float))) {
    throw std::invalid_argument("a vector of " + std::to_string(count) + " floats has " +
                                std::to_string(span.second) + " bytes");
  }
  return reinterpret_cast<float*>(span.first);
}

// On the CPU, where memory can be read.
template <class Args>
void require_rows(const Args& t) {
  for (int64_t i = 0; t.index != nullptr && i < t.n; ++i) {
    if (t.index[i] < 0 || t.index[i] >= t.rows) {
      throw std::invalid_argument("index must be in [0, " + std::to_string(t.rows) + "), got " +
                                  std::to_string(t.index[i]));
    }
  }
}

void require_type(DType dtype, bool bfloat16 = true) {
  if (dtype == DType::kFloat32 || (bfloat16 && dtype == DType::kBFloat16)) return;
  throw std::invalid_argument("no type of the CPU kernels");
}

template <class Args>
void bind_cpu_pair_tile(py::module_& m, const char* name,
                        bool (*cpu::Kernels::*kernel)(const char*, const float*, const Args&,
                                                      int)) {
  m.def(
      name,
      [kernel](const std::string& loss, Params params, const Args& args, int threads) {
        if constexpr (std::is_same_v<Args, cpu::PairGradient>) require_type(args.gradient_dtype);
        require((cpu::kernels().*kernel)(loss.c_str(), numbers(params), args, threads), loss);
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
      [](const std::string& loss, Params params, const cpu::SumTile& args, int threads) {
        require_type(args.gradient_dtype);
        require(cpu::kernels().sum_tile(loss.c_str(), numbers(params), args, threads), loss);
      },
      Unlock());
  m.def(
      "logsumexp_tile",
      [](const std::string& loss, Params params, const LogsumexpTileArgs& args, int threads) {
        require(cpu::kernels().logsumexp_tile(loss.c_str(), numbers(params), args, threads), loss);
      },
      Unlock());
  m.def(
      "logsumexp_gradient_tile",
      [](const std::string& loss, Params params, const LogsumexpGradientArgs& args, int threads) {
        require_type(args.gradient_dtype);
        require(
            cpu::kernels().logsumexp_gradient_tile(loss.c_str(), numbers(params), args, threads),
            loss);
      },
      Unlock());
  m.def(
      "positive_rows",
      [](const std::string& loss, Params params, const Span& cosine, int64_t n, const Span& logit,
         const Span& slope) {
        require(cpu::kernels().positive_rows(loss.c_str(), numbers(params), floats(cosine, n), n,
                                             floats(logit, n), floats(slope, n)),
                loss);
      },
      Unlock());
  m.def(
      "unit_rows",
      [](const UnitRowsArgs& args, int threads) {
        require_type(args.source_dtype, false);
        require_type(args.unit_dtype);
        require_rows(args);
        cpu::kernels().unit_rows(args, threads);
      },
      Unlock());
  m.def(
      "unit_rows_backward",
      [](const UnitRowsBackwardArgs& args, int threads) {
        require_type(args.source_dtype, false);
        require_type(args.out_dtype, false);
        require_rows(args);
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
      [](const UpdateRowsArgs& args, int threads) {
        require_rows(args);
        cpu::kernels().update_rows(args, threads);
      },
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
void* handle(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

template <class Args>
void bind_cuda_pair_tile(py::module_& m, const char* name,
                         void (*kernel)(const std::string&, const float*, const Args&, float*,
                                        void*)) {
  m.def(
      name,
      [kernel](const std::string& loss, Params params, const Args& args, const Span& scratch,
               std::uintptr_t stream) {
        kernel(loss, numbers(params), args, floats(scratch, 0), handle(stream));
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
      [](const std::string& loss, Params params, const cuda::SumTile& args, const Span& scratch,
         std::uintptr_t stream) {
        cuda::sum_tile(loss, numbers(params), args, floats(scratch, 0), handle(stream));
      },
      Unlock());
  m.def(
      "logsumexp_tile",
      [](const std::string& loss, Params params, const LogsumexpTileArgs& args, const Span& scratch,
         std::uintptr_t stream) {
        cuda::logsumexp_tile(loss, numbers(params), args, floats(scratch, 0), handle(stream));
      },
      Unlock());
  m.def(
      "logsumexp_gradient_tile",
      [](const std::string& loss, Params params, const LogsumexpGradientArgs& args,
         std::uintptr_t stream) {
        cuda::logsumexp_gradient_tile(loss, numbers(params), args, handle(stream));
      },
      Unlock());
  m.def(
      "positive_rows",
      [](const std::string& loss, Params params, const Span& cosine, int64_t n, const Span& logit,
         const Span& slope, std::uintptr_t stream) {
        cuda::positive_rows(loss, numbers(params), floats(cosine, n), n, floats(logit, n),
                            floats(slope, n), handle(stream));
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
      [](const std::string& loss, Params params, const cuda::PairGradient& args,
         std::uintptr_t stream) {
        cuda::pair_gradient_tile(loss, numbers(params), args, handle(stream));
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
