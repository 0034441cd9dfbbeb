// The tiles of a log-sum-exp over samples against loops in double precision over the same policy.

#include <array>

#include "checks.h"
#include "unitsface/losses.h"
#include "unitsface/pair_logit.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

struct PairCase {
  int64_t n, m, gap;  // gap: stride - m
  int shift;          // off alignment
  bool both;          // statistics and gradients of the columns too
  int64_t diagonal, labels;
  DType dtype;
  bool in_place;
};

// Inputs of a test of one policy: labels, cosines, and the valid pairs.
struct Tile {
  PairCase c;
  int64_t stride, size;
  Buffer<int64_t> a_labels, b_labels;
  std::vector<float> cosines;

  explicit Tile(const PairCase& given)
      : c(given),
        stride(c.m + c.gap),
        size((c.n - 1) * stride + c.m),
        a_labels(c.n, 0),
        b_labels(c.m, 0),
        cosines(size, 7.0f) {
    // Labels beyond 32 bits; one in eight is ignored.
    const auto label = [&] {
      return integer(0, 7) == 0 ? -integer(1, 2) : (integer(0, c.labels - 1) << 33) + 5;
    };
    for (int64_t i = 0; i < c.n; ++i) a_labels[i] = label();
    for (int64_t j = 0; j < c.m; ++j) b_labels[j] = label();
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t j = 0; j < c.m; ++j) {
        // Excluded pairs may be NaN.
        cosines[i * stride + j] = valid(i, j) ? uniform(-1.0f, 1.0f) : kNaN;
      }
    }
  }
  bool valid(int64_t i, int64_t j) {
    return a_labels[i] >= 0 && b_labels[j] >= 0 &&
           !(c.diagonal != INT64_MIN && j == i + c.diagonal);
  }
  bool same(int64_t i, int64_t j) { return a_labels[i] == b_labels[j]; }
  float cosine(int64_t i, int64_t j) const { return cosines[i * stride + j]; }

  template <class Args>
  Args arguments(Buffer<float>& stored) {
    std::copy(cosines.begin(), cosines.end(), stored.data);
    Args args = {};
    args.cosines = stored.data;
    args.n = c.n, args.m = c.m, args.stride = stride;
    args.a_labels = a_labels.data, args.b_labels = b_labels.data;
    args.diagonal = c.diagonal;
    return args;
  }
};

// The number of row i and, in the other direction, of column j.
struct Sides {
  Buffer<float> a, b;
  Sides(const PairCase& c, float value) : a(c.n, value), b(c.m, value) {}
  Sides(const PairCase& c, float low, float high) : a(c.n, 0.0f), b(c.m, 0.0f) {
    for (int64_t i = 0; i < c.n; ++i) a[i] = uniform(low, high);
    for (int64_t j = 0; j < c.m; ++j) b[j] = uniform(low, high);
  }
};

// With kTwo positives have a log-sum-exp as well.
template <bool kTwo, class Policy>
void test_negatives(const char* loss, const float* params, Tile& tile) {
  const Policy policy(params);
  const PairCase& c = tile.c;
  Buffer<float> stored(tile.size, 7.0f, c.shift);
  Buffer<float> workspace(cuda::pair_statistics_workspace(c.n, c.m), kNaN);
  // Some rows have negatives in earlier tiles.
  Sides maximum(c, -INFINITY), total(c, 0.0f);
  for (int64_t i = 0; i < c.n; i += 3) maximum.a[i] = 5.0f, total.a[i] = 2.0f;
  std::vector<double> rows(c.n), columns(c.m, 0.0);
  for (int64_t i = 0; i < c.n; ++i) rows[i] = i % 3 == 0 ? 2.0 * std::exp(5.0) : 0.0;
  auto args = tile.arguments<cuda::PairNegatives>(stored);
  args.a_maximum = maximum.a.data, args.a_total = total.a.data;
  if (c.both) args.b_maximum = maximum.b.data, args.b_total = total.b.data;
  Sides positive_maximum(c, -INFINITY), positive_total(c, 0.0f);
  for (int64_t i = 0; i < c.n; i += 2) positive_maximum.a[i] = -4.0f, positive_total.a[i] = 3.0f;
  std::vector<double> positive_rows(c.n), positive_columns(c.m, 0.0);
  for (int64_t i = 0; i < c.n; ++i) positive_rows[i] = i % 2 == 0 ? 3.0 * std::exp(-4.0) : 0.0;
  if (kTwo) {
    args.a_positive_maximum = positive_maximum.a.data;
    args.a_positive_total = positive_total.a.data;
    if (c.both) {
      args.b_positive_maximum = positive_maximum.b.data;
      args.b_positive_total = positive_total.b.data;
    }
  }
  cuda::pair_negatives_tile(loss, params, args, workspace.data, nullptr);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      const bool same = tile.same(i, j);
      if (!tile.valid(i, j) || (same && !kTwo)) continue;
      const float cosine = tile.cosine(i, j);
      const Logit z = kTwo ? pair_logit(policy, cosine, same) : policy.negative(cosine);
      const double e = std::exp(static_cast<double>(z.value));
      (same ? positive_rows : rows)[i] += e;
      if (c.both) (same ? positive_columns : columns)[j] += e;
    }
  }
  const auto check = [](float largest, float sum, double wanted, const char* what, int64_t k) {
    if (wanted == 0.0) {
      expect(largest, -INFINITY, 0.0, "maximum without negatives", k, 0);
      expect(sum, 0.0, 0.0, "total without negatives", k, 0);
    } else {
      expect(largest + std::log(sum), std::log(wanted), 1e-5, what, k, 0);
    }
  };
  for (int64_t i = 0; i < c.n; ++i) check(maximum.a[i], total.a[i], rows[i], "row", i);
  for (int64_t j = 0; j < c.m; ++j) check(maximum.b[j], total.b[j], columns[j], "column", j);
  for (int64_t i = 0; kTwo && i < c.n; ++i) {
    check(positive_maximum.a[i], positive_total.a[i], positive_rows[i], "positives of a row", i);
  }
  for (int64_t j = 0; kTwo && j < c.m; ++j) {
    check(positive_maximum.b[j], positive_total.b[j], positive_columns[j], "of a column", j);
  }
}

void test_positives(const float* params, Tile& tile) {
  const PairSoftmax policy(params);
  const PairCase& c = tile.c;
  Buffer<float> stored(tile.size, 7.0f, c.shift);
  Buffer<float> workspace(cuda::pair_statistics_workspace(c.n, c.m), kNaN);
  Sides log_negatives(c, -10.0f, 15.0f), loss(c, 0.5f), negative_prob(c, 0.25f);
  auto args = tile.arguments<cuda::PairPositives>(stored);
  args.a_log_negatives = log_negatives.a.data;
  args.a_loss = loss.a.data, args.a_negative_prob = negative_prob.a.data;
  if (c.both) {
    args.b_log_negatives = log_negatives.b.data;
    args.b_loss = loss.b.data, args.b_negative_prob = negative_prob.b.data;
  }
  cuda::pair_positives_tile("pair_softmax", params, args, workspace.data, nullptr);
  std::vector<double> rows(c.n, 0.5), columns(c.m, 0.5);
  std::vector<double> row_negative_prob(c.n, 0.25), column_negative_prob(c.m, 0.25);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      if (!tile.valid(i, j) || !tile.same(i, j)) continue;
      const double z = policy.positive(tile.cosine(i, j)).value;
      rows[i] += std::log1p(std::exp(log_negatives.a[i] - z));
      row_negative_prob[i] += 1.0 / (1.0 + std::exp(z - log_negatives.a[i]));
      if (!c.both) continue;
      columns[j] += std::log1p(std::exp(log_negatives.b[j] - z));
      column_negative_prob[j] += 1.0 / (1.0 + std::exp(z - log_negatives.b[j]));
    }
  }
  for (int64_t i = 0; i < c.n; ++i) {
    expect(loss.a[i], rows[i], 1e-5, "loss of a row", i, 0);
    expect(negative_prob.a[i], row_negative_prob[i], 1e-5, "negative_prob of a row", i, 0);
  }
  for (int64_t j = 0; j < c.m; ++j) {
    expect(loss.b[j], columns[j], 1e-5, "loss of a column", j, 0);
    expect(negative_prob.b[j], column_negative_prob[j], 1e-5, "negative_prob of a column", j, 0);
  }
}

template <bool kTwo, class Policy>
void test_gradient(const char* loss, const float* params, Tile& tile) {
  const Policy policy(params);
  const PairCase& c = tile.c;
  Buffer<float> stored(tile.size, 7.0f, c.shift);
  Buffer<char> other(tile.size * bytes_of(c.dtype), 42);
  Sides log_negatives(c, 16.0f, 25.0f), negative(c, 0.1f, 1.0f), positive(c, 0.1f, 1.0f);
  Sides log_positives(c, 15.0f, 20.0f);
  // An ignored row.
  for (int64_t i = 0; i < c.n; i += 4) {
    log_negatives.a[i] = log_positives.a[i] = INFINITY, negative.a[i] = positive.a[i] = 0.0f;
  }
  auto args = tile.arguments<cuda::PairGradient>(stored);
  args.gradient = c.in_place ? static_cast<void*>(stored.data) : other.data;
  args.gradient_dtype = c.dtype;
  args.gradient_scale = 32.0f;
  args.a_log_negatives = log_negatives.a.data;
  args.a_negative_weight = negative.a.data, args.a_positive_weight = positive.a.data;
  if (c.both) {
    args.b_log_negatives = log_negatives.b.data;
    args.b_negative_weight = negative.b.data, args.b_positive_weight = positive.b.data;
  }
  if (kTwo) args.a_log_positives = log_positives.a.data;
  if (kTwo && c.both) args.b_log_positives = log_positives.b.data;
  cuda::pair_gradient_tile(loss, params, args, nullptr);
  const auto slope = [](double z, bool same, const std::array<float, 4>& of) {
    const auto [negatives, positives, if_negative, if_positive] = of;
    if (kTwo && same) return if_positive * std::exp(z - positives);
    return same ? -if_positive / (1.0 + std::exp(z - negatives))
                : if_negative * std::exp(z - negatives);
  };
  const auto numbers = [&](bool columns, int64_t k) {
    const auto of = [&](Sides& sides) { return columns ? sides.b[k] : sides.a[k]; };
    return std::array<float, 4>{of(log_negatives), of(log_positives), of(negative), of(positive)};
  };
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      const bool same = tile.same(i, j);
      double wanted = 0.0;
      if (tile.valid(i, j) && (Policy::kPositives || !same)) {
        const Logit z = pair_logit(policy, tile.cosine(i, j), same);
        wanted = slope(z.value, same, numbers(false, i));
        if (c.both) wanted += slope(z.value, same, numbers(true, j));
        wanted *= z.dcosine;
      }
      expect(element(args.gradient, c.dtype, i * tile.stride + j), 32.0 * wanted,
             tolerance_of(c.dtype), "gradient", i, j);
    }
    if (!c.in_place) continue;
    for (int64_t j = c.m; j < tile.stride && i + 1 < c.n; ++j) {
      expect(stored[i * tile.stride + j], 7.0, 0.0, "between rows", i, j);
    }
  }
}

void test_pairs() {
  // In the order of the structs: scale and margin times scale; bounds and scale; 1 + margin,
  // margin - 1, scale and margin; a scale and that times the base, twice, and minus the first.
  const float softmax[] = {16.0f, 1.6f}, filtered[] = {-0.5f, 0.75f, 16.0f};
  const float circle[] = {1.25f, -0.75f, 4.0f, 0.25f},
              similarity[] = {2.0f, 1.0f, 8.0f, 4.0f, -2.0f};
  const int64_t shapes[][2] = {{1, 1}, {7, 129}, {33, 260}, {5, 3}, {9, 1028}, {70, 64}};
  int64_t k = 0;
  for (const auto& shape : shapes) {
    for (const bool both : {false, true}) {
      for (int d = 0; d < 3; ++d, ++k) {
        PairCase c = {};
        c.n = shape[0], c.m = shape[1];
        c.gap = k % 4 == 1 ? 4 : k % 4 == 2 ? 3 : 0;
        c.shift = k % 7 == 3 ? 1 : 0;
        c.both = both;
        c.diagonal = k % 3 == 0 ? INT64_MIN : k % 3 == 1 ? 0 : (k % 2 == 0 ? -3 : 2);
        c.labels = k % 5 == 4 ? 1 : k % 2 == 0 ? 3 : 40;
        c.dtype = static_cast<DType>(d);
        c.in_place = d == 0 && k % 2 == 0;
        Tile tile(c);
        test_negatives<false, PairSoftmax>("pair_softmax", softmax, tile);
        test_negatives<false, PairLogsumexp>("pair_logsumexp", filtered, tile);
        test_positives(softmax, tile);
        test_gradient<false, PairSoftmax>("pair_softmax", softmax, tile);
        test_gradient<false, PairLogsumexp>("pair_logsumexp", filtered, tile);
        test_negatives<true, Circle>("circle", circle, tile);
        test_negatives<true, MultiSimilarity>("multi_similarity", similarity, tile);
        test_gradient<true, Circle>("circle", circle, tile);
        test_gradient<true, MultiSimilarity>("multi_similarity", similarity, tile);
      }
    }
  }
}

// NaN of a valid pair reaches the sum, for any earlier values.
void test_nan() {
  const float params[] = {16.0f, 0.1f};
  PairCase c = {};
  c.n = 3, c.m = 5, c.both = true, c.diagonal = INT64_MIN, c.labels = 1;
  Tile tile(c);
  for (int64_t i = 0; i < c.n; ++i) tile.a_labels[i] = 1;
  for (int64_t j = 0; j < c.m; ++j) tile.b_labels[j] = 2;
  std::fill(tile.cosines.begin(), tile.cosines.end(), 0.5f);
  tile.cosines[tile.stride + 2] = kNaN;
  Buffer<float> stored(tile.size, 0.0f), workspace(cuda::pair_statistics_workspace(3, 5), kNaN);
  Sides maximum(c, -INFINITY), total(c, 0.0f);
  auto args = tile.arguments<cuda::PairNegatives>(stored);
  args.a_maximum = maximum.a.data, args.a_total = total.a.data;
  args.b_maximum = maximum.b.data, args.b_total = total.b.data;
  cuda::pair_negatives_tile("pair_softmax", params, args, workspace.data, nullptr);
  for (int64_t i = 0; i < c.n; ++i) expect(total.a[i], i == 1 ? kNaN : 5.0, 1e-6, "NaN row", i, 0);
  for (int64_t j = 0; j < c.m; ++j)
    expect(total.b[j], j == 2 ? kNaN : 3.0, 1e-6, "NaN column", j, 0);
}

void test_edges() {
  const float params[] = {16.0f, 0.1f};
  const auto all = [&](int64_t n, int64_t m) {
    cuda::PairNegatives negatives = {};
    cuda::PairPositives positives = {};
    cuda::PairGradient gradient = {};
    negatives.n = positives.n = gradient.n = n;
    negatives.m = positives.m = gradient.m = m;
    cuda::pair_negatives_tile("pair_softmax", params, negatives, nullptr, nullptr);
    cuda::pair_positives_tile("pair_softmax", params, positives, nullptr, nullptr);
    cuda::pair_gradient_tile("pair_softmax", params, gradient, nullptr);
  };
  expect_no_launch([&] { all(0, 5); }, "tile without rows");
  expect_no_launch([&] { all(5, 0); }, "tile without columns");
  const float other[] = {-2.0f, 2.0f, 16.0f};
  cuda::PairPositives some = {};
  some.n = some.m = 4;
  expect_no_launch(
      [&] { cuda::pair_positives_tile("pair_logsumexp", other, some, nullptr, nullptr); },
      "pass over positives that take no part");
  const float four[] = {1.25f, -0.75f, 4.0f, 0.25f};
  const auto throws = [](auto run, const char* what) {
    bool thrown = false;
    try {
      run();
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    expect(thrown, 1.0, 0.0, what, 0, 0);
  };
  throws([&] { cuda::pair_negatives_tile("uss", params, {}, nullptr, nullptr); },
         "an unknown loss throws");
  cuda::PairNegatives without = {};
  cuda::PairGradient no_logs = {};
  without.n = without.m = no_logs.n = no_logs.m = 4;
  throws([&] { cuda::pair_negatives_tile("circle", four, without, nullptr, nullptr); },
         "statistics without room for positives throw");
  throws([&] { cuda::pair_gradient_tile("circle", four, no_logs, nullptr); },
         "a gradient without log-sum-exps of positives throws");
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    test_pairs();
    test_nan();
    test_edges();
  });
}
