// The totals of sm_90a against loops in double precision over the same policy.

#include "cuda/fused/kernels.h"
#include "fused_cases.h"
#include "unitsface/losses.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

struct TotalCase {
  Kind kind;
  int64_t n, m, depth;
  bool mirrored, both, dthreshold, gradient;
  int64_t diagonal;
  bool not_finite;  // ignored rows and columns are NaN
};

template <class Policy>
void test_total(const char* name, const std::vector<float>& params, const TotalCase& c) {
  const Policy policy(params.data());
  Operands operands(c.kind, c.n, c.m, c.depth, (8 - c.depth % 8) % 8 + 8);
  const int64_t stride = (c.m + 7) / 8 * 8 + 8;
  Buffer<int64_t> a_labels(c.n, 0), b_labels(c.m, 0);
  for (Buffer<int64_t>* labels : {&a_labels, &b_labels}) {
    for (int64_t k = 0; k < labels->size; ++k) {
      (*labels)[k] = integer(0, 7) == 0 ? -integer(1, 2) : (integer(0, 3) << 33) + 5;
    }
  }
  if (c.not_finite) operands.spoil(a_labels, b_labels);
  const std::vector<float> cosines = operands.cosines();
  Buffer<float> threshold(1, 1.5f);
  Buffer<float> loss(cuda::sm90::fused_sum_total_slots(c.n, c.m), 0.25f),
      dthreshold(loss.size, 0.5f);
  Buffer<char> gradient(c.n * stride * 2, 42), untouched(c.n * stride * 2, 42);
  cuda::SumTile args = {};
  args.gradient = c.gradient ? gradient.data : nullptr;
  args.gradient_dtype = c.kind.dtype;
  args.gradient_scale = c.kind.dtype == DType::kFloat16 ? 64.0f : 1.0f;
  args.n = c.n, args.m = c.m, args.stride = stride;
  args.a_labels = a_labels.data, args.b_labels = b_labels.data;
  args.b_threshold = threshold.data;
  args.a_loss = loss.data;
  args.b_loss = c.both ? loss.data : nullptr;
  args.b_dthreshold = c.dthreshold ? dthreshold.data : nullptr;
  args.diagonal = c.diagonal;
  args.mirrored = c.mirrored;
  expect(
      cuda::sm90::supports(operands.given(), c.n, c.m, args.gradient, args.gradient_dtype, stride),
      1.0, 0.0, "supports", 0, 0);
  cuda::sm90::fused_sum_total(name, params.data(), operands.given(), args, nullptr);

  double wanted = 0.0, d_wanted = 0.0, magnitude = 1.0;
  const double directions = c.both ? 2.0 : 1.0;
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < stride; ++j) {
      const float got = element(gradient.data, c.kind.dtype, i * stride + j);
      if (j >= c.m || !c.gradient) {
        const float before = element(untouched.data, c.kind.dtype, 0);
        expect(got, before, 0.0, std::string(name) + " gradient outside", i, j);
        continue;
      }
      double by_cosine = 0.0;
      const bool left_out = c.diagonal != INT64_MIN && j == i + c.diagonal;
      if (a_labels[i] >= 0 && b_labels[j] >= 0 && !left_out) {
        const Term term =
            policy.evaluate(cosines[i * c.m + j], threshold[0], a_labels[i] == b_labels[j]);
        wanted += directions * term.value;
        d_wanted += directions * term.dthreshold;
        magnitude += directions * std::fabs(term.dthreshold);
        by_cosine = (c.mirrored ? 2.0 : 1.0) * args.gradient_scale * term.dcosine;
      }
      expect(got, by_cosine, tolerance_of(c.kind.dtype), std::string(name) + " gradient", i, j);
    }
  }
  double sum = 0.0, d_sum = 0.0;
  for (int64_t k = 0; k < loss.size; ++k) {
    sum += loss[k] - 0.25;
    d_sum += dthreshold[k] - 0.5;
  }
  if (!c.gradient) return;
  expect(static_cast<float>(sum), wanted, 2e-5, std::string(name) + " loss", 0, 0);
  expect(static_cast<float>(d_sum / magnitude), c.dthreshold ? d_wanted / magnitude : 0.0, 1e-5,
         std::string(name) + " threshold", 0, 0);
}

void test_totals() {
  const Kind bf16 = kKinds[0], fp16 = kKinds[1];
  test_total<USS>("uss", {16.0f, 1.6f}, {bf16, 130, 140, 72, true, false, true, true, 0, true});
  test_total<USS>("uss", {64.0f, 6.4f},
                  {fp16, 150, 300, 16, true, true, false, true, INT64_MIN, false});
  test_total<UCE>("uce", {16.0f, 16.0f, 1.6f, 0.25f, -16.0f},
                  {bf16, 70, 260, 40, false, false, true, true, -3, true});
  test_total<UCE>("uce", {16.0f, 16.0f, 1.6f, 0.25f, -16.0f},
                  {fp16, 130, 20, 520, false, false, true, true, INT64_MIN, false});
  if (!thorough) return;
  for (const Kind& kind : {bf16, fp16}) {
    for (int k = 0; k < 6; ++k) {
      const TotalCase c = {kind,
                           integer(1, 400),
                           integer(1, 500),
                           integer(1, 64) * (k % 2 == 0 ? 8 : 1),
                           k % 2 == 0,
                           k % 3 == 0,
                           k % 5 != 0,
                           k != 4,
                           k % 2 == 0 ? integer(-200, 200) : INT64_MIN,
                           k % 3 == 1};
      test_total<USS>("uss", {24.0f, 2.4f}, c);
    }
  }
}

void test_rules() {
  Operands operands(kKinds[0], 4, 4, 16, 8);
  const auto supported = [&](cuda::FusedOperands given, DType gradient, int64_t stride) {
    return cuda::sm90::supports(given, 4, 4, operands.a.data, gradient, stride);
  };
  const auto rule = [&](bool got, bool wanted, const char* what) {
    expect(got, wanted, 0.0, what, 0, 0);
  };
  cuda::FusedOperands given = operands.given();
  rule(supported(given, DType::kBFloat16, 8), true, "aligned rows are supported");
  rule(supported(given, DType::kFloat32, 8), false, "a gradient of float32");
  rule(supported(given, DType::kBFloat16, 9), false, "rows of a gradient off alignment");
  given.a_stride = 17;
  rule(supported(given, DType::kBFloat16, 8), false, "rows off alignment");
  given = operands.given();
  given.dtype = DType::kFloat32;
  rule(supported(given, DType::kBFloat16, 8), false, "float32");
  const float params[] = {1.0f, 1.0f};
  expect_no_launch(
      [&] { cuda::sm90::fused_sum_total("uss", params, operands.given(), {}, nullptr); }, "total");
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    test_totals();
    test_rules();
  });
}
