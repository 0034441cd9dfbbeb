// The fused kernels of log-sum-exps over samples against those on the products that loops compute.

#include "fused_cases.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

struct PairCase {
  std::string loss;
  bool two;  // log-sum-exps
  Kind kind;
  int64_t n, m, depth, gap;
  bool both;
  DType gradient_dtype;
  int64_t diagonal;
  bool not_finite = false;  // ignored rows and columns are NaN
};

// Two numbers per row and per column, of negatives and of positives.
struct Statistics {
  std::vector<Buffer<float>> values;

  Statistics(const PairCase& c, float first, float second) {
    for (int k = 0; k < 8; ++k) {
      values.emplace_back(k % 4 < 2 ? c.n : c.m, k % 2 == 0 ? first : second);
    }
  }
  float* operator[](int k) { return values[k].data; }
};

// Log-sum-exps, which do not depend on how they are split.
void expect_same_sums(Statistics& got, Statistics& wanted, int count, const std::string& what) {
  for (int k = 0; k < count; k += 2) {
    for (int64_t i = 0; i < wanted.values[k].size; ++i) {
      expect(got[k][i] + std::log(got[k + 1][i]),
             wanted[k][i] + std::log(static_cast<double>(wanted[k + 1][i])), 2e-5,
             what + std::to_string(k), i, 0);
    }
  }
}

template <class Args>
void set_pairs(Args& args, const PairCase& c, const Buffer<int64_t>& a, const Buffer<int64_t>& b,
               float* cosines) {
  args.cosines = cosines;
  args.n = c.n, args.m = c.m, args.stride = c.m;
  args.a_labels = a.data, args.b_labels = b.data;
  args.diagonal = c.diagonal;
}

void set_statistics(cuda::PairNegatives& args, const PairCase& c, Statistics& s) {
  args.a_maximum = s[0], args.a_total = s[1];
  args.b_maximum = c.both ? s[2] : nullptr, args.b_total = c.both ? s[3] : nullptr;
  if (!c.two) return;
  args.a_positive_maximum = s[4], args.a_positive_total = s[5];
  args.b_positive_maximum = c.both ? s[6] : nullptr;
  args.b_positive_total = c.both ? s[7] : nullptr;
}

void set_positives(cuda::PairPositives& args, const PairCase& c, Statistics& s) {
  args.a_loss = s[0], args.a_negative_prob = s[1];
  args.b_loss = c.both ? s[2] : nullptr, args.b_negative_prob = c.both ? s[3] : nullptr;
}

void test_pairs(const PairCase& c) {
  const float params[16] = {8.0f, 0.3f, 0.4f, 2.0f, 0.1f};
  Operands operands(c.kind, c.n, c.m, c.depth, c.gap);
  Buffer<int64_t> a_labels(c.n, 0), b_labels(c.m, 0);
  for (Buffer<int64_t>* labels : {&a_labels, &b_labels}) {
    for (int64_t k = 0; k < labels->size; ++k) {
      (*labels)[k] = integer(0, 7) == 0 ? -integer(1, 2) : (integer(0, 5) << 33) + 5;
    }
  }
  if (c.not_finite) operands.spoil(a_labels, b_labels);
  std::vector<float> cosines = operands.spread(c.m);
  Buffer<float> workspace(cuda::pair_statistics_workspace(c.n, c.m), kNaN);
  Buffer<float> own(cuda::fused_pair_statistics_workspace(c.n, c.m), kNaN);

  Statistics wanted(c, -4.0f, 1.5f), got(c, -4.0f, 1.5f);
  cuda::PairNegatives negatives = {};
  std::vector<float> copy = cosines;
  set_pairs(negatives, c, a_labels, b_labels, copy.data());
  set_statistics(negatives, c, wanted);
  cuda::pair_negatives_tile(c.loss, params, negatives, workspace.data, nullptr);
  negatives.cosines = nullptr;
  set_statistics(negatives, c, got);
  cuda::fused_pair_negatives_tile(c.loss, params, operands.given(), negatives, own.data, nullptr);
  expect_same_sums(got, wanted, 8, "log-sum-exp of " + c.loss);

  Statistics sides(c, 3.0f, 0.4f);
  for (auto& side : sides.values) {
    for (int64_t k = 0; k < side.size; ++k) side[k] += uniform(-0.3f, 0.3f);
  }
  if (!c.two) {
    Statistics losses(c, 0.5f, 0.25f), same(c, 0.5f, 0.25f);
    cuda::PairPositives positives = {};
    set_pairs(positives, c, a_labels, b_labels, cosines.data());
    positives.a_log_negatives = sides[0];
    positives.b_log_negatives = c.both ? sides[2] : nullptr;
    set_positives(positives, c, losses);
    cuda::pair_positives_tile(c.loss, params, positives, workspace.data, nullptr);
    positives.cosines = nullptr;
    set_positives(positives, c, same);
    cuda::fused_pair_positives_tile(c.loss, params, operands.given(), positives, own.data, nullptr);
    for (int k = 0; k < 4; ++k) {
      expect_same(same.values[k], losses.values[k], 2e-5, "positives " + std::to_string(k));
    }
  }

  cuda::PairGradient args = {};
  set_pairs(args, c, a_labels, b_labels, cosines.data());
  const int64_t bytes = c.n * c.m * bytes_of(c.gradient_dtype);
  Buffer<char> gradient(bytes, 42), other(bytes, 42);
  args.gradient = gradient.data, args.gradient_dtype = c.gradient_dtype;
  args.gradient_scale = 4.0f;
  args.a_log_negatives = sides[0], args.a_negative_weight = sides[1];
  args.a_positive_weight = sides[5], args.a_log_positives = sides[4];
  if (c.both) {
    args.b_log_negatives = sides[2], args.b_negative_weight = sides[3];
    args.b_positive_weight = sides[7], args.b_log_positives = sides[6];
  }
  cuda::pair_gradient_tile(c.loss, params, args, nullptr);
  args.cosines = nullptr;
  args.gradient = other.data;
  cuda::fused_pair_gradient_tile(c.loss, params, operands.given(), args, nullptr);
  expect_same_gradient(other, gradient, c.gradient_dtype, c.m, c.m, "gradient of " + c.loss);
}

void test_all() {
  const int64_t shapes[][4] = {{1, 1, 3, 0}, {131, 40, 64, 8}, {20, 150, 40, 1}};
  int64_t k = 0;
  for (const Kind& kind : kKinds) {
    for (const auto& s : shapes) {
      for (const bool two : {false, true}) {
        test_pairs({two ? "multi_similarity" : "pair_softmax", two, kind, s[0], s[1], s[2], s[3],
                    k % 3 != 1, static_cast<DType>(k % 3),
                    k % 4 == 0   ? INT64_MIN
                    : k % 4 == 1 ? -3
                                 : 0});
        ++k;
      }
    }
  }
}

}  // namespace

int main(int argc, char**) { return checks::run(argc, test_all); }
