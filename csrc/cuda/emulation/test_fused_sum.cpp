// fused_sum_tile against sum_tile on the products that loops compute.

#include "fused_cases.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

struct SumCase {
  const char* loss = "uss";
  Kind kind;
  int64_t n, m, depth, gap, gradient_gap;
  bool per_column, mirrored, both, weights, dthreshold, gradient;
  DType gradient_dtype;
  int64_t diagonal;
  bool not_finite = false;  // ignored rows and columns are NaN
};

// What a tile adds to.
struct Sums {
  Buffer<float> a_loss, b_loss, a_dthreshold, b_dthreshold;
  Buffer<char> gradient;

  explicit Sums(const SumCase& c)
      : a_loss(c.n, 0.5f),
        b_loss(c.m, 0.25f),
        a_dthreshold(c.per_column ? c.n : 1, -1.0f),
        b_dthreshold(c.per_column ? c.m : 1, 2.0f),
        gradient(((c.n - 1) * (c.m + c.gradient_gap) + c.m) * bytes_of(c.gradient_dtype), 42) {}

  void add_to(cuda::SumTile& args, const SumCase& c) {
    args.a_loss = a_loss.data;
    args.b_loss = c.both ? b_loss.data : nullptr;
    args.a_dthreshold = c.dthreshold ? a_dthreshold.data : nullptr;
    args.b_dthreshold = c.dthreshold ? b_dthreshold.data : nullptr;
    args.gradient = c.gradient ? gradient.data : nullptr;
  }
};

void test_sum(const SumCase& c) {
  const float params[] = {16.0f, 1.6f, 1.6f, 0.25f, -16.0f};
  Operands operands(c.kind, c.n, c.m, c.depth, c.gap);
  const int64_t stride = c.m + c.gradient_gap;
  Buffer<int64_t> a_labels(c.n, 0), b_labels(c.m, 0);
  Buffer<float> a_threshold(c.n, 3.0f), b_threshold(c.per_column ? c.m : 1, 3.0f);
  Buffer<float> a_weights(c.n, 1.0f), b_weights(c.m, 1.0f);
  for (Buffer<int64_t>* labels : {&a_labels, &b_labels}) {
    for (int64_t k = 0; k < labels->size; ++k) {
      (*labels)[k] = integer(0, 7) == 0 ? -integer(1, 2) : (integer(0, 3) << 33) + 5;
    }
  }
  for (Buffer<float>* values : {&a_threshold, &b_threshold, &a_weights, &b_weights}) {
    for (int64_t k = 0; k < values->size; ++k) (*values)[k] = uniform(-1.0f, 2.0f);
  }
  if (c.not_finite) operands.spoil(a_labels, b_labels);
  std::vector<float> cosines = operands.spread(stride);
  cuda::SumTile args = {};
  args.cosines = cosines.data();
  args.gradient_dtype = c.gradient_dtype;
  args.gradient_scale = c.gradient_dtype == DType::kFloat16 ? 64.0f : 1.0f;
  args.n = c.n, args.m = c.m, args.stride = stride;
  args.a_labels = a_labels.data, args.b_labels = b_labels.data;
  args.a_threshold = c.mirrored || c.both ? a_threshold.data : nullptr;
  args.b_threshold = b_threshold.data;
  args.per_column = c.per_column;
  args.a_weights = c.weights ? a_weights.data : nullptr;
  args.b_weights = c.weights ? b_weights.data : nullptr;
  args.diagonal = c.diagonal;
  args.mirrored = c.mirrored;

  Sums wanted(c), got(c);
  wanted.add_to(args, c);
  Buffer<float> workspace(cuda::sum_tile_workspace(c.n, c.m), kNaN);
  cuda::sum_tile(c.loss, params, args, workspace.data, nullptr);
  got.add_to(args, c);
  args.cosines = nullptr;
  Buffer<float> own(cuda::fused_sum_tile_workspace(c.n, c.m), kNaN);
  cuda::fused_sum_tile(c.loss, params, operands.given(), args, own.data, nullptr);

  const double size = 2e-5;
  expect_same(got.a_loss, wanted.a_loss, size, "a_loss");
  expect_same(got.b_loss, wanted.b_loss, size, "b_loss");
  const double terms = c.per_column ? size : size * std::sqrt(static_cast<double>(c.n * c.m));
  expect_same(got.a_dthreshold, wanted.a_dthreshold, terms, "a_dthreshold");
  expect_same(got.b_dthreshold, wanted.b_dthreshold, terms, "b_dthreshold");
  expect_same_gradient(got.gradient, wanted.gradient, c.gradient_dtype, c.m, stride, "gradient");
}

void test_sums() {
  const int64_t shapes[][3] = {{1, 1, 1}, {130, 40, 96}, {19, 150, 33}};
  int64_t k = 0;
  for (const Kind& kind : kKinds) {
    for (const auto& shape : shapes) {
      SumCase c = {};
      c.kind = kind;
      c.n = shape[0], c.m = shape[1], c.depth = shape[2];
      c.gap = shape[2] % 8 == 0 ? 8 : k % 2;
      c.gradient_gap = k % 3 == 0 ? 0 : k % 3 == 1 ? 3 : 8 - c.m % 8;
      c.per_column = k % 2 == 0;
      c.both = k % 3 != 1;
      c.mirrored = c.both || k % 5 == 0;
      c.weights = k % 3 != 0;
      c.dthreshold = k % 5 != 4;
      c.gradient = k % 7 != 6;
      c.gradient_dtype = static_cast<DType>(k % 3);
      c.diagonal = k % 3 == 0 ? 0 : k % 3 == 1 ? INT64_MIN : -3;
      test_sum(c);
      ++k;
    }
  }
}

}  // namespace

int main(int argc, char**) { return checks::run(argc, test_sums); }
