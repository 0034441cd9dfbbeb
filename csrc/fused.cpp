// Bindings of the CUDA kernels that multiply themselves (cuda/fused).
#include "calls.h"
#include "cuda/fused/kernels.h"

namespace unitsface {
namespace {

// With the extent of either matrix.
struct BoundOperands : cuda::FusedOperands {
  int64_t n = 0, m = 0;

  int64_t bytes(int64_t rows, int64_t stride) const {
    const int64_t elements = rows == 0 || depth == 0 ? 0 : (rows - 1) * stride + depth;
    return elements * (dtype == DType::kFloat32 ? 4 : 2);
  }
  // Kernels count the bytes of a row in 32 bits.
  bool fits() const {
    constexpr int64_t kMost = INT32_MAX / 4;
    return depth >= 0 && a_stride >= depth && b_stride >= depth && a_stride <= kMost &&
           b_stride <= kMost;
  }
};

template <class Args>
void require_same_tile(const BoundOperands& operands, const Args& args) {
  if (operands.n == args.n && operands.m == args.m) return;
  throw std::invalid_argument("operands are those of another tile");
}

// With or without a workspace of a function's floats.
template <class Bound, class Args>
void bind_tile(Module& m, const std::string& name, cuda::WorkspaceDriver<Args>* kernel,
               int64_t (*size)(int64_t, int64_t)) {
  m.def((name + "_workspace").c_str(), size);
  m.def(
      name.c_str(),
      [kernel, size](const std::string& loss, Params params, const BoundOperands& operands,
                     const Bound& args, const Span& workspace, std::uintptr_t stream) {
        require_same_tile(operands, args);
        kernel(loss, numbers(params, kMostParameters), operands, args,
               floats(workspace, size(args.n, args.m)), handle(stream));
      },
      Unlock());
}

template <class Bound, class Args>
void bind_tile(Module& m, const std::string& name, cuda::Driver<Args>* kernel) {
  m.def(
      name.c_str(),
      [kernel](const std::string& loss, Params params, const BoundOperands& operands,
               const Bound& args, std::uintptr_t stream) {
        require_same_tile(operands, args);
        kernel(loss, numbers(params, kMostParameters), operands, args, handle(stream));
      },
      Unlock());
}

}  // namespace

void bind_fused(Module& m, Module& target) {
  using namespace cuda;
  using O = BoundOperands;
  Fields<O>(m, "FusedOperands")
      .field("a", &O::a, [](const O& t) { return t.bytes(t.n, t.a_stride); })
      .field("b", &O::b, [](const O& t) { return t.bytes(t.m, t.b_stride); })
      .field("dtype", &O::dtype)
      .field("tf32", &O::tf32)
      .field("n", &O::n)
      .field("m", &O::m)
      .field("depth", &O::depth)
      .field("a_stride", &O::a_stride)
      .field("b_stride", &O::b_stride)
      .check([](const O& t) { return t.fits(); }, "depth and strides of the operands");
#define UF_BIND_DRIVERS(space, suffix)                                                           \
  target.def("fused_sum_total" suffix "_slots", &space::fused_sum_total_slots);                  \
  bind_tile<SumTile>(target, "fused_sum_total" suffix, &space::fused_sum_total);                 \
  bind_tile<SumTile>(target, "fused_sum_tile" suffix, &space::fused_sum_tile,                    \
                     &fused_sum_tile_workspace);                                                 \
  bind_tile<LogsumexpTile>(target, "fused_logsumexp_tile" suffix, &space::fused_logsumexp_tile,  \
                           &fused_logsumexp_tile_workspace);                                     \
  bind_tile<LogsumexpGradientTile>(target, "fused_logsumexp_gradient_tile" suffix,               \
                                   &space::fused_logsumexp_gradient_tile);                       \
  bind_tile<PairNegatives>(target, "fused_pair_negatives_tile" suffix,                           \
                           &space::fused_pair_negatives_tile, &fused_pair_statistics_workspace); \
  bind_tile<PairPositives>(target, "fused_pair_positives_tile" suffix,                           \
                           &space::fused_pair_positives_tile, &fused_pair_statistics_workspace); \
  bind_tile<PairGradient>(target, "fused_pair_gradient_tile" suffix,                             \
                          &space::fused_pair_gradient_tile)
  UF_BIND_DRIVERS(cuda, "");
#if defined(UF_WITH_SM90)
  UF_BIND_DRIVERS(sm90, "_sm90");
#endif
#undef UF_BIND_DRIVERS
}

}  // namespace unitsface
