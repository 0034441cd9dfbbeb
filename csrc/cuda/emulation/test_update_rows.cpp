// update_rows against the rules in double precision; other rows keep their bits.

#include "checks.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

enum class Kind { kSgd, kMomentum, kNesterov, kAdamW };

struct Numbers {
  double weight, first, second;
};

Numbers stepped(Kind kind, Numbers x, double g, const UpdateRowsArgs& t) {
  if (kind == Kind::kAdamW) {
    x.first += t.one_minus_beta1 * (g - x.first);
    x.second = t.beta2 * x.second + t.one_minus_beta2 * g * g;
    const double root = std::sqrt(x.second) / t.second_correction + t.eps;
    x.weight = t.kept * x.weight - t.step_size * x.first / root;
    return x;
  }
  g += t.weight_decay * x.weight;
  if (kind != Kind::kSgd) x.first = t.momentum * x.first + g;
  if (kind == Kind::kMomentum) g = x.first;
  if (kind == Kind::kNesterov) g += t.momentum * x.first;
  x.weight -= t.step_size * g;
  return x;
}

void test_update(Kind kind, int64_t n, int64_t d, int shift, bool indexed, bool scaled) {
  const int64_t total = n + 5, start = 2;
  Buffer<float> weight(total * d, 0.0f, shift), first(total * d, 0.0f, shift),
      second(total * d, 0.0f, shift), gradient(n * d, 0.0f, shift);
  for (int64_t k = 0; k < total * d; ++k) {
    weight[k] = uniform(-2.0f, 2.0f);
    first[k] = uniform(-1.0f, 1.0f);
    second[k] = uniform(0.0f, 1.0f);
  }
  for (int64_t k = 0; k < n * d; ++k) gradient[k] = uniform(-1.0f, 1.0f);
  // Gradient row of each row of the matrix; -1: none.
  std::vector<int64_t> owner(total, -1);
  Buffer<int64_t> index(n, 0);
  std::vector<int64_t> rows(total);
  for (int64_t i = 0; i < total; ++i) rows[i] = i;
  std::shuffle(rows.begin(), rows.end(), random_bits);
  for (int64_t i = 0; i < n; ++i) {
    index[i] = rows[i];
    owner[indexed ? rows[i] : start + i] = i;
  }
  float scale = 0.25f;
  UpdateRowsArgs args = {};
  args.weight = weight.data;
  args.gradient = gradient.data;
  args.index = indexed ? index.data : nullptr;
  args.start = start;
  args.n = n;
  args.d = d;
  args.gradient_scale = scaled ? &scale : nullptr;
  args.rule = kind == Kind::kAdamW ? RowRule::kAdamW : RowRule::kSgd;
  args.step_size = 0.1f;
  args.weight_decay = 0.3f;
  args.momentum = 0.9f;
  args.nesterov = kind == Kind::kNesterov;
  args.kept = 0.97f;
  args.one_minus_beta1 = 0.1f;
  args.beta2 = 0.95f;
  args.one_minus_beta2 = 0.05f;
  args.second_correction = 0.6f;
  args.eps = 1e-3f;
  args.first = kind == Kind::kSgd ? nullptr : first.data;
  args.second = kind == Kind::kAdamW ? second.data : nullptr;
  const auto copy = [&](Buffer<float>& b) { return std::vector<float>(b.data, b.data + b.size); };
  const std::vector<float> weights = copy(weight), firsts = copy(first), seconds = copy(second);
  cuda::update_rows(args, nullptr);
  for (int64_t i = 0; i < total; ++i) {
    for (int64_t k = 0; k < d; ++k) {
      const int64_t e = i * d + k;
      Numbers wanted = {weights[e], firsts[e], seconds[e]};
      const bool takes_part = owner[i] >= 0;
      if (takes_part) {
        const double g = gradient[owner[i] * d + k] * (scaled ? 0.25 : 1.0);
        wanted = stepped(kind, wanted, g, args);
      }
      const double tolerance = takes_part ? 1e-5 : 0.0;
      expect(weight[e], wanted.weight, tolerance, "weight", i, k);
      expect(first[e], wanted.first, tolerance, "first state", i, k);
      expect(second[e], wanted.second, tolerance, "second state", i, k);
    }
  }
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    int k = 0;
    for (const Kind kind : {Kind::kSgd, Kind::kMomentum, Kind::kNesterov, Kind::kAdamW}) {
      for (const int64_t d : {1, 2, 3, 4, 8, 33, 36, 48, 100, 128, 130, 513, 520}) {
        for (int variant = 0; variant < 3; ++variant, ++k) {
          const int64_t n = d == 1 ? 300 + variant : 9 + 4 * variant;
          test_update(kind, n, d, k % 3 == 1, k % 2 == 0, k % 5 < 2);
        }
      }
    }
    expect_no_launch([] { cuda::update_rows({}, nullptr); }, "update");
  });
}
