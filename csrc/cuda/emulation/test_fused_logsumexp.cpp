// fused_logsumexp_tile and its gradient against the kernels on the products that loops compute.

#include "class_rows.h"
#include "fused_cases.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

void test_logsumexp(const Kind& kind, int64_t n, int64_t m, int64_t depth, int64_t gap,
                    DType gradient_dtype) {
  const float params[] = {1.0f, 1.0f, 0.5f, 16.0f, 3.2f, 0.0f};
  const Operands operands(kind, n, m, depth, gap);
  const int64_t start = 1000, stride = m + gap % 4;
  ClassRows rows(n, m, start);
  std::vector<float> cosines = operands.spread(stride);
  LogsumexpTileArgs args = {cosines.data(), n,       m,       stride, rows.targets.data,
                            start,          nullptr, nullptr, nullptr};
  struct Sums {
    Buffer<float> maximum, total, target_cosine;
    explicit Sums(int64_t rows)
        : maximum(rows, -3.0f), total(rows, 2.0f), target_cosine(rows, 9.0f) {}
    void add_to(LogsumexpTileArgs& tile) {
      tile.maximum = maximum.data, tile.total = total.data;
      tile.target_cosine = target_cosine.data;
    }
  } wanted(n), got(n);
  wanted.add_to(args);
  Buffer<float> workspace(cuda::logsumexp_tile_workspace(n, m), kNaN);
  cuda::logsumexp_tile("margin_softmax", params, args, workspace.data, nullptr);
  got.add_to(args);
  args.cosines = nullptr;
  Buffer<float> own(cuda::fused_logsumexp_tile_workspace(n, m), kNaN);
  cuda::fused_logsumexp_tile("margin_softmax", params, operands.given(), args, own.data, nullptr);
  for (int64_t i = 0; i < n; ++i) {
    const double log = wanted.maximum[i] + std::log(wanted.total[i]);
    expect(got.maximum[i] + std::log(got.total[i]), log, 2e-5, "log-sum-exp", i, 0);
    rows.set(i, static_cast<float>(log));
  }
  expect_same(got.target_cosine, wanted.target_cosine, 1e-5, "target cosine");

  const int64_t bytes = ((n - 1) * stride + m) * bytes_of(gradient_dtype);
  Buffer<char> gradient(bytes, 42), other(bytes, 42);
  LogsumexpGradientArgs slopes =
      rows.gradient(cosines.data(), gradient.data, gradient_dtype, stride);
  cuda::logsumexp_gradient_tile("margin_softmax", params, slopes, nullptr);
  slopes.cosines = nullptr;
  slopes.gradient = other.data;
  cuda::fused_logsumexp_gradient_tile("margin_softmax", params, operands.given(), slopes, nullptr);
  expect_same_gradient(other, gradient, gradient_dtype, m, stride, "logsumexp gradient");
}

void test_all() {
  const int64_t shapes[][4] = {{1, 1, 3, 0}, {131, 40, 64, 8}, {20, 260, 40, 1}};
  int64_t k = 0;
  for (const Kind& kind : kKinds) {
    for (const auto& s : shapes) {
      test_logsumexp(kind, s[0], s[1], s[2], s[3], static_cast<DType>(k++ % 3));
    }
  }
  const float params[6] = {16.0f};
  expect_no_launch(
      [&] { cuda::fused_logsumexp_tile("margin_softmax", params, {}, {}, nullptr, nullptr); },
      "fused tile");
}

}  // namespace

int main(int argc, char**) { return checks::run(argc, test_all); }
