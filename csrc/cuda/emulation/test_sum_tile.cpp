// sum_tile against loops in double precision over the same policy.

#include "checks.h"
#include "unitsface/losses.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

struct SumCase {
  int64_t n, m, gap;                // gap: stride - m
  int shift;                        // off alignment
  bool per_column, mirrored, both;  // both: b_loss given
  bool weights, dthreshold;
  int gradient;  // 0: none, 1: in place, 2: float32, 3: bfloat16, 4: float16
  int64_t diagonal;
  int64_t labels;  // number of identities
};

void test_sum(const SumCase& c) {
  // Scale and margin times scale.
  const float params[] = {16.0f, 1.6f};
  const USS policy(params);
  const int64_t stride = c.m + c.gap;
  Buffer<float> stored((c.n - 1) * stride + c.m, 7.0f, c.shift);
  Buffer<int64_t> a_labels(c.n, 0), b_labels(c.m, 0);
  Buffer<float> a_threshold(c.per_column ? c.n : 1, 3.0f),
      b_threshold(c.per_column ? c.m : 1, 3.0f);
  Buffer<float> a_weights(c.n, 1.0f), b_weights(c.m, 1.0f);
  Buffer<float> a_loss(c.n, 0.5f), b_loss(c.m, 0.25f), a_dthreshold(c.n, -1.0f);
  Buffer<float> b_dthreshold(c.per_column ? c.m : 1, 2.0f);
  // Labels beyond 32 bits; one in eight is ignored.
  const auto label = [&] {
    return integer(0, 7) == 0 ? -integer(1, 2) : (integer(0, c.labels - 1) << 33) + 5;
  };
  for (int64_t i = 0; i < c.n; ++i) a_labels[i] = label();
  for (int64_t j = 0; j < c.m; ++j) b_labels[j] = label();
  if (c.per_column) {
    for (int64_t i = 0; i < c.n; ++i) a_threshold[i] = uniform(-4.0f, 4.0f);
    for (int64_t j = 0; j < c.m; ++j) b_threshold[j] = uniform(-4.0f, 4.0f);
  }
  if (c.weights) {
    for (int64_t i = 0; i < c.n; ++i) a_weights[i] = uniform(-1.0f, 2.0f);
    for (int64_t j = 0; j < c.m; ++j) b_weights[j] = uniform(-1.0f, 2.0f);
  }
  const auto counted = [&](int64_t i, int64_t j) {
    return a_labels[i] >= 0 && b_labels[j] >= 0 &&
           !(c.diagonal != INT64_MIN && j == i + c.diagonal);
  };
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      // Excluded pairs may be NaN.
      stored[i * stride + j] = counted(i, j) ? uniform(-1.0f, 1.0f) : kNaN;
    }
  }
  const std::vector<float> cosines(stored.data, stored.data + stored.size);

  const DType dtype = c.gradient == 3   ? DType::kBFloat16
                      : c.gradient == 4 ? DType::kFloat16
                                        : DType::kFloat32;
  Buffer<char> other(stored.size * bytes_of(dtype), 42);
  void* gradient = c.gradient == 0   ? nullptr
                   : c.gradient == 1 ? static_cast<void*>(stored.data)
                                     : other.data;
  const float gradient_scale = c.gradient == 4 ? 64.0f : 1.0f;
  Buffer<float> workspace(cuda::sum_tile_workspace(c.n, c.m), kNaN);

  cuda::SumTile args = {};
  args.cosines = stored.data;
  args.gradient = gradient;
  args.gradient_dtype = dtype;
  args.gradient_scale = gradient_scale;
  args.n = c.n, args.m = c.m, args.stride = stride;
  args.a_labels = a_labels.data, args.b_labels = b_labels.data;
  args.a_threshold = a_threshold.data, args.b_threshold = b_threshold.data;
  args.per_column = c.per_column;
  args.a_weights = c.weights ? a_weights.data : nullptr;
  args.b_weights = c.weights ? b_weights.data : nullptr;
  args.a_loss = a_loss.data;
  args.b_loss = c.both ? b_loss.data : nullptr;
  args.a_dthreshold = c.dthreshold ? a_dthreshold.data : nullptr;
  args.b_dthreshold = c.dthreshold ? b_dthreshold.data : nullptr;
  args.diagonal = c.diagonal;
  args.mirrored = c.mirrored;
  cuda::sum_tile("uss", params, args, workspace.data, nullptr);

  std::vector<double> rows(c.n, 0.5), columns(c.m, 0.25), d_rows(c.n, -1.0);
  std::vector<double> d_columns(b_dthreshold.size, 2.0);
  double magnitude = 1.0;
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      double wanted = 0.0;
      if (counted(i, j)) {
        const float cosine = cosines[i * stride + j];
        const bool same = a_labels[i] == b_labels[j];
        const double wi = a_weights[i], wj = b_weights[j];
        const Term row = policy.evaluate(cosine, b_threshold[c.per_column ? j : 0], same);
        const Term column = policy.evaluate(cosine, a_threshold[c.per_column ? i : 0], same);
        rows[i] += row.value;
        wanted = wi * row.dcosine + (c.mirrored ? wj * column.dcosine : 0.0);
        d_columns[c.per_column ? j : 0] += wi * row.dthreshold;
        magnitude += std::fabs(row.dthreshold);
        if (c.both) {
          columns[j] += column.value;
          (c.per_column ? d_rows[i] : d_columns[0]) += wj * column.dthreshold;
        }
      }
      if (gradient != nullptr) {
        expect(element(gradient, dtype, i * stride + j), wanted * gradient_scale,
               tolerance_of(dtype), "sum gradient", i, j);
      }
    }
    if (c.gradient == 1) {
      for (int64_t j = c.m; j < stride && i + 1 < c.n; ++j) {
        expect(stored[i * stride + j], 7.0, 0.0, "between rows", i, j);
      }
    }
  }
  for (int64_t i = 0; i < c.n; ++i) {
    expect(a_loss[i], rows[i], 1e-5, "a_loss", i, 0);
    const bool added = c.per_column && c.both && c.dthreshold;
    expect(a_dthreshold[i], added ? d_rows[i] : -1.0, 1e-5, "a_dthreshold", i, 0);
  }
  for (int64_t j = 0; j < c.m; ++j) {
    expect(b_loss[j], c.both ? columns[j] : 0.25, 1e-5, "b_loss", 0, j);
  }
  for (int64_t j = 0; j < b_dthreshold.size; ++j) {
    // Terms of both signs cancel: the tolerance is relative to the sum of absolute values.
    expect(b_dthreshold[j], c.dthreshold ? d_columns[j] : 2.0, 1e-6 * magnitude, "b_dthreshold", 0,
           j);
  }
}

void test_sums() {
  const int64_t shapes[][2] = {{1, 1}, {7, 129},  {129, 128}, {33, 260},
                               {5, 3}, {64, 512}, {130, 132}, {256, 64}};
  int64_t k = 0;
  for (const auto& shape : shapes) {
    for (const bool per_column : {false, true}) {
      for (int mode = 0; mode < 3; ++mode) {  // columns, diagonal, off the diagonal
        for (int gradient = 0; gradient < 5; ++gradient, ++k) {
          SumCase c = {};
          c.n = shape[0], c.m = shape[1];
          c.gap = k % 4 == 1 ? 4 : k % 4 == 2 ? 3 : 0;
          c.shift = k % 7 == 3 ? 1 : 0;
          c.per_column = per_column;
          c.mirrored = mode > 0;
          c.both = mode == 2;
          c.weights = k % 3 != 0;
          c.dthreshold = k % 5 != 4;
          c.gradient = gradient;
          c.diagonal = mode == 1 ? 0 : mode == 2 ? (k % 2 == 0 ? -3 : 2) : INT64_MIN;
          c.labels = k % 2 == 0 ? 3 : 1;
          test_sum(c);
        }
      }
    }
  }
  // Blocks of more than one step of rows.
  if (thorough) test_sum({66001, 131, 1, 0, false, true, true, true, true, 3, 0, 5});
}

void test_edges() {
  const float params[] = {16.0f, 0.1f};
  cuda::SumTile sum = {};
  const auto call = [&] { cuda::sum_tile("uss", params, sum, nullptr, nullptr); };
  sum.m = 5;
  expect_no_launch(call, "sum tile without rows");
  sum.n = 5, sum.m = 0;
  expect_no_launch(call, "sum tile without columns");
  expect(static_cast<float>(cuda::sum_tile_workspace(0, 5)), 0.0, 0.0, "workspace", 0, 0);
  bool thrown = false;
  try {
    cuda::sum_tile("margin_softmax", params, sum, nullptr, nullptr);
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  expect(thrown, 1.0, 0.0, "an unknown loss throws", 0, 0);
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    test_sums();
    test_edges();
  });
}
