// The histogram kernels against a loop over the pairs.

#include "checks.h"
#include "unitsface/histogram_bin.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

struct Case {
  int64_t n, m, gap, bins, diagonal;
  bool upper, per_row, ranges;
};

// Scores below, on and above the edges; many are equal, since a block counts in 16 bits.
float random_score() {
  switch (integer(0, 9)) {
    case 0:
      return static_cast<float>(integer(-9, 9)) / 8.0f;
    case 1:
      return std::nextafter(static_cast<float>(integer(-8, 8)) / 8.0f, uniform(-2.0f, 2.0f));
    case 2:
      return integer(0, 1) == 0 ? -0.0f : 0.0f;
    default:
      return integer(0, 50) == 0 ? kNaN : uniform(-0.2f, 0.2f);
  }
}

int64_t expected_bin(float score, const cuda::HistogramTile& args) {
  if (std::isnan(score)) return args.bins + 2;
  if (score < args.low) return 0;
  const float position = std::floor((score - args.low) * args.scale);
  return 1 + static_cast<int64_t>(std::min(position, static_cast<float>(args.bins)));
}

// Counter of a score, -1 if it has none.
int64_t expected_slot(float score, const cuda::HistogramTile& args) {
  const int64_t bin = expected_bin(score, args);
  if (args.range_of_bin == nullptr) return bin;
  if (args.range_of_bin[bin] < 0) return -1;
  const ScoreRange range = args.ranges[args.range_of_bin[bin]];
  const int64_t offset = score_key(score) - range.low;
  return offset < 0 || offset >= range.size ? -1 : range.first + offset / (1 << range.shift);
}

void test_histogram(const Case& c, bool crowded) {
  const int64_t stride = c.m + c.gap, size = (c.n - 1) * stride + c.m;
  Buffer<float> stored(size, kNaN);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) stored[i * stride + j] = crowded ? 0.01f : random_score();
  }
  Buffer<int64_t> a_labels(c.n, 0), b_labels(c.m, 0);
  for (int64_t i = 0; i < c.n; ++i) a_labels[i] = integer(-1, 5) + (int64_t(1) << 40);
  for (int64_t j = 0; j < c.m; ++j) b_labels[j] = integer(-1, 5) + (int64_t(1) << 40);
  if (c.n > 2) a_labels[2] = -1;
  if (c.m > 2) b_labels[2] = -1;

  cuda::HistogramTile args = {};
  args.cosines = stored.data;
  args.n = c.n, args.m = c.m, args.stride = stride;
  args.a_labels = a_labels.data, args.b_labels = b_labels.data;
  args.diagonal = c.diagonal, args.upper = c.upper, args.per_row = c.per_row;
  args.low = -1.0f, args.bins = c.bins, args.scale = static_cast<float>(c.bins) / 2.0f;
  args.slots = c.bins + 3;
  // The whole of one bin in single values, and the middle of another in groups of 8.
  Buffer<int32_t> range_of_bin(c.bins + 3, -1);
  Buffer<ScoreRange> ranges(2, {});
  if (c.ranges) {
    ranges[0] = {score_key(0.125f), 40, 0, 0};
    ranges[1] = {score_key(0.0f) - 20, 43, 3, 40};
    range_of_bin[expected_bin(0.125f, args)] = 0;
    range_of_bin[expected_bin(0.0f, args)] = 1;
    args.range_of_bin = range_of_bin.data;
    args.ranges = ranges.data;
    args.slots = 46;
  }
  const int64_t size_of_counts = (c.per_row ? c.n : 1) * 2 * args.slots;
  Buffer<int64_t> counts(size_of_counts, 3);  // added to
  args.counts = counts.data;
  cuda::histogram_tile(args, nullptr);

  std::vector<int64_t> wanted(size_of_counts, 3);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      const bool left_out =
          c.diagonal != INT64_MIN && (c.upper ? j <= i + c.diagonal : j == i + c.diagonal);
      if (a_labels[i] < 0 || b_labels[j] < 0 || left_out) continue;
      const int64_t slot = expected_slot(stored[i * stride + j], args);
      const int64_t kind = a_labels[i] == b_labels[j] ? 0 : 1;
      if (slot >= 0) ++wanted[((c.per_row ? i : 0) * 2 + kind) * args.slots + slot];
    }
  }
  for (int64_t k = 0; k < size_of_counts; ++k) {
    expect(static_cast<float>(counts[k]), static_cast<double>(wanted[k]), 0.0, "count", k, c.m);
  }
}

void test_histograms() {
  const Case cases[] = {
      {1, 1, 0, 16, INT64_MIN, false, false, false},
      {33, 1025, 0, 16, INT64_MIN, false, false, false},
      {70, 2100, 3, 16384, 0, true, false, false},
      {70, 2100, 0, 16384, -40, false, false, false},
      {40, 1500, 1, 24573, 7, true, false, false},   // the most that shared memory holds
      {40, 1500, 0, 24574, -7, true, false, false},  // one more
      {35, 300, 0, 64, 2, false, true, false},
      {40, 1300, 0, 16, 0, true, false, true},
      {40, 1300, 2, 16, INT64_MIN, false, true, true},
  };
  for (const Case& c : cases) {
    test_histogram(c, false);
    test_histogram(c, true);
  }
}

void test_empty() {
  expect_no_launch([] { cuda::histogram_tile({}, nullptr); }, "histogram tile");
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    test_histograms();
    test_empty();
  });
}
