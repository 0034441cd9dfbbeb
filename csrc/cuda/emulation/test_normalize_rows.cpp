// normalize_rows and its backward pass against loops in double precision.

#include "checks.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

void test_normalize_rows(int64_t n, int64_t d, DType source_dtype, DType out_dtype, int shift,
                         bool indexed, bool in_place, bool scaled) {
  const int64_t total = n + 5, start = 2;
  Buffer<char> source(total * d * bytes_of(source_dtype), 0, shift);
  Buffer<int64_t> index(n, 0);
  for (int64_t k = 0; k < total * d; ++k) {
    // Row 4 is zero, row 5 below the smallest norm, row 6 has a NaN, the squares of row 7 overflow,
    // row 8 has an infinity.
    const int64_t row = k / d;
    float x = row == 4 ? 0.0f : row == 5 ? 1e-7f : uniform(-2.0f, 2.0f);
    if (row == 7) x *= 1e30f;
    if (row == 8 && k % d == d / 2) x = -INFINITY;
    set_element(source.data, source_dtype, k, row == 6 && k % d == d / 2 ? kNaN : x);
  }
  for (int64_t i = 0; i < n; ++i) index[i] = integer(0, total - 1);
  const auto x = [&](int64_t i, int64_t k) -> double {
    return element(source.data, source_dtype, (indexed ? index[i] : start + i) * d + k);
  };
  Buffer<char> unit(n * d * bytes_of(out_dtype), 42, shift);
  Buffer<float> inverse_norms(n, kNaN), d_unit(n * d, 0.0f, shift);
  const NormalizeRowsArgs args = {
      source.data, source_dtype,      indexed ? index.data : nullptr, start, n, d, unit.data,
      out_dtype,   inverse_norms.data};
  cuda::normalize_rows(args, nullptr);
  for (int64_t k = 0; k < n * d; ++k) d_unit[k] = uniform(-1.0f, 1.0f);
  const std::vector<float> gradients(d_unit.data, d_unit.data + d_unit.size);
  Buffer<char> other(n * d * bytes_of(out_dtype), 42, shift);
  void* out = in_place ? static_cast<void*>(d_unit.data) : other.data;
  float scale = 0.25f;
  const NormalizeRowsBackwardArgs back = {
      d_unit.data,        source.data, source_dtype, indexed ? index.data : nullptr, start, n, d,
      inverse_norms.data, out,         out_dtype,    scaled ? &scale : nullptr};
  cuda::normalize_rows_backward(back, nullptr);
  for (int64_t i = 0; i < n; ++i) {
    double squares = 0.0, dot = 0.0;
    for (int64_t k = 0; k < d; ++k) {
      squares += x(i, k) * x(i, k);
      dot += x(i, k) * gradients[i * d + k];
    }
    const bool clamped = std::sqrt(squares) < kNormEps;
    const double inverse =
        std::isinf(squares) ? kNaN : 1.0 / (clamped ? kNormEps : std::sqrt(squares));
    if (std::isfinite(inverse) && inverse < 1e-20) {
      expect(inverse_norms[i] * 1e30f, inverse * 1e30, 1e-6, "small inverse norm", i, 0);
    }
    expect(inverse_norms[i], inverse, 1e-6, "inverse norm", i, 0);
    const double projection = clamped ? 0.0 : dot * inverse * inverse;
    for (int64_t k = 0; k < d; ++k) {
      expect(element(unit.data, out_dtype, i * d + k), x(i, k) * inverse, tolerance_of(out_dtype),
             "unit row", i, k);
      const double wanted =
          (scaled ? 0.25 : 1.0) * inverse * (gradients[i * d + k] - projection * x(i, k));
      const bool overflows = out_dtype == DType::kFloat16 && std::fabs(wanted) > 65504.0;
      if (!overflows) {
        expect(element(out, out_dtype, i * d + k), wanted, tolerance_of(out_dtype), "raw gradient",
               i, k);
      }
    }
  }
}

void test_rows() {
  int k = 0;
  for (const int64_t d : {1, 4, 48, 100, 512, 513, 520, 1048}) {
    for (int s = 0; s < 3; ++s) {
      for (int o = 0; o < 3; ++o, ++k) {
        test_normalize_rows(k % 2 == 0 ? 9 : 21, d, static_cast<DType>(s), static_cast<DType>(o),
                            k % 6 == 4, k % 4 == 1, o == 0 && k % 2 == 1, k % 3 == 1);
      }
    }
  }
}

void test_empty() {
  expect_no_launch([] { cuda::normalize_rows({}, nullptr); }, "block of rows");
  expect_no_launch([] { cuda::normalize_rows_backward({}, nullptr); }, "block of gradients");
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    test_rows();
    test_empty();
  });
}
