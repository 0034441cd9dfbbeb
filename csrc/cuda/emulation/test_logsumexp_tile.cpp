// The logsumexp kernels against loops in double precision over the same policy.

#include "class_rows.h"
#include "unitsface/losses.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

void test_logsumexp(int64_t n, int64_t m, int64_t gap, int shift, DType dtype, bool in_place) {
  // In the order of the struct: angular margin 0.5, scale 16, margin 0.2 * 16.
  const float params[] = {1.0f, 1.0f, 0.5f, 16.0f, 3.2f, 0.0f};
  const MarginSoftmax policy(params);
  const int64_t stride = m + gap, start = 1000, size = (n - 1) * stride + m;
  Buffer<float> maximum(n, -INFINITY), total(n, 0.0f), target_cosine(n, 9.0f);
  ClassRows rows(n, m, start);
  std::vector<double> sums(n, 0.0);
  // Two tiles, the second without targets, then the first one's gradient.
  std::vector<float> first;
  for (int tile = 1; tile >= 0; --tile) {
    Buffer<float> stored(size, 7.0f, shift);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) stored[i * stride + j] = uniform(-1.0f, 1.0f);
    }
    if (n > 3) stored[3 * stride + m / 2] = kNaN;
    first.assign(stored.data, stored.data + size);
    const int64_t origin = start + tile * 100000;
    Buffer<float> workspace(cuda::logsumexp_tile_workspace(n, m), kNaN);
    LogsumexpTileArgs args = {
        stored.data,       n, m, stride, rows.targets.data, origin, maximum.data, total.data,
        target_cosine.data};
    // A row whose only column is its target has no negatives.
    if (tile == 0 || m > 1) {
      cuda::logsumexp_tile("margin_softmax", params, args, workspace.data, nullptr);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j) {
          if (origin + j != rows.targets[i]) {
            sums[i] += std::exp(policy.negative(first[i * stride + j]).value);
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t column = rows.targets[i] - start;
    const bool inside = column >= 0 && column < m;
    expect(target_cosine[i], inside ? first[i * stride + column] : 9.0, 0.0, "target cosine", i, 0);
    if (sums[i] == 0.0) {
      expect(maximum[i], -INFINITY, 0.0, "maximum without negatives", i, 0);
      expect(total[i], 0.0, 0.0, "total without negatives", i, 0);
    } else {
      expect(maximum[i] + std::log(total[i]), std::log(sums[i]), 1e-5, "log-sum-exp", i, 0);
    }
    rows.set(i, std::isnan(sums[i]) ? kNaN : static_cast<float>(std::log(sums[i] + 1e-30)));
  }
  Buffer<float> stored(size, 7.0f, shift);
  std::copy(first.begin(), first.end(), stored.data);
  Buffer<char> other(size * bytes_of(dtype), 42);
  void* gradient = in_place ? static_cast<void*>(stored.data) : other.data;
  const LogsumexpGradientArgs args = rows.gradient(stored.data, gradient, dtype, stride);
  cuda::logsumexp_gradient_tile("margin_softmax", params, args, nullptr);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const Logit z = policy.negative(first[i * stride + j]);
      const double negative = rows.weights[i] *
                              std::exp(static_cast<double>(z.value) - rows.log_negatives[i]) *
                              z.dcosine;
      const double wanted = rows.weights[i] == 0.0f        ? 0.0
                            : start + j == rows.targets[i] ? rows.target_gradients[i]
                                                           : negative;
      expect(element(gradient, dtype, i * stride + j), 32.0 * wanted, tolerance_of(dtype),
             "logsumexp gradient", i, j);
    }
  }
}

void test_logsumexps() {
  const int64_t columns[] = {1, 4, 7, 1000, 1023, 1024, 1028, 2500, 10300};
  int k = 0;
  for (const int64_t m : columns) {
    for (const int64_t n : {1, 9, 40}) {
      for (int d = 0; d < 3; ++d, ++k) {
        const DType dtype = static_cast<DType>(d);
        test_logsumexp(n, m,
                       k % 4 == 1   ? 4
                       : k % 4 == 2 ? 1
                                    : 0,
                       k % 5 == 3, dtype, d == 0 && k % 2 == 0);
      }
    }
  }
}

void test_positive_rows() {
  for (const float detached : {0.0f, 1.0f}) {
    const float params[] = {1.0f, 1.7f, 0.5f, 64.0f, 6.4f, detached};
    constexpr int64_t n = 700;
    Buffer<float> cosine(n, 0.0f), logit(n, kNaN), slope(n, kNaN);
    for (int64_t i = 0; i < n; ++i) cosine[i] = -1.0f + 2.0f * i / (n - 1);
    cuda::positive_rows("margin_softmax", params, cosine.data, n, logit.data, slope.data, nullptr);
    for (int64_t i = 0; i < n; ++i) {
      const double pi = std::acos(-1.0), m1 = params[1], m2 = params[2], m3 = 0.1;
      const double theta = std::acos(static_cast<double>(cosine[i])), angle = m1 * theta + m2;
      const double k = std::floor(angle / pi), sign = std::fmod(k, 2.0) == 0.0 ? 1.0 : -1.0;
      const double sine = std::max(std::sin(theta), 1e-4);
      // Margins are computed in float32: errors are those of a cosine, whatever the scale.
      expect(logit[i] / 64.0, sign * std::cos(angle) - 2.0 * k - m3, 2e-6, "logit", i, 0);
      expect(slope[i] / 64.0, detached != 0.0f ? 1.0 : sign * std::sin(angle) * m1 / sine, 1e-5,
             "slope", i, 0);
    }
  }
}

void test_empty() {
  const float params[6] = {16.0f};
  expect_no_launch([&] { cuda::logsumexp_tile("margin_softmax", params, {}, nullptr, nullptr); },
                   "logsumexp tile");
  expect_no_launch([&] { cuda::logsumexp_gradient_tile("margin_softmax", params, {}, nullptr); },
                   "logsumexp gradient tile");
  expect_no_launch(
      [&] { cuda::positive_rows("margin_softmax", params, nullptr, 0, nullptr, nullptr, nullptr); },
      "list of positives");
  expect(static_cast<float>(cuda::logsumexp_tile_workspace(5, 0)), 0.0, 0.0, "workspace", 0, 0);
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    test_logsumexps();
    test_positive_rows();
    test_empty();
  });
}
