// The search kernel against a sort of each row, over several tiles.

#include <utility>

#include "checks.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

using Column = std::pair<float, int64_t>;

bool comes_before(const Column& x, const Column& y) {
  const bool x_nan = std::isnan(x.first), y_nan = std::isnan(y.first);
  if (x_nan != y_nan) return x_nan;
  if (!x_nan && x.first != y.first) return x.first > y.first;
  return x.second < y.second;
}

// `levels`: cosines are multiples of 1 / levels, so that many are equal; 0: any.
void test_nearest(int64_t n, int64_t m, int64_t k, int64_t gap, int shift, int64_t levels) {
  const int64_t tiles = 3, origin = 1000, stride = m + gap;
  Buffer<float> best(n * k, -INFINITY), target_cosine(n, 9.0f);
  Buffer<int32_t> position(n * k, -1);
  Buffer<int64_t> targets(n, 0);
  std::vector<std::vector<Column>> wanted(n);
  std::vector<float> wanted_target(n, 9.0f);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t kind = integer(0, 4);
    targets[i] = kind == 0   ? -1 - integer(0, 1)
                 : kind == 1 ? origin - 1
                             : origin + integer(0, tiles * m - 1);
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t start = origin + tile * m;
    Buffer<float> stored((n - 1) * stride + m, 7.0f, shift);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        float cosine = uniform(-1.0f, 1.0f);
        if (levels > 0) cosine = static_cast<float>(integer(-levels, levels)) / levels;
        // Equal to 0 whatever its sign.
        if (cosine == 0.0f && j % 2 == 1) cosine = -0.0f;
        // NaN of either sign: infinity times 0 gives a negative one.
        if (i % 4 == 3 && integer(0, m) < 3) cosine = std::copysign(kNaN, cosine);
        stored[i * stride + j] = cosine;
        if (start + j == targets[i]) {
          wanted_target[i] = cosine;
        } else {
          wanted[i].emplace_back(cosine, start + j);
        }
      }
    }
    const NearestTileArgs args = {stored.data, n, m,         stride,        targets.data,
                                  start,       k, best.data, position.data, target_cosine.data};
    cuda::nearest_tile(args, nullptr);
  }
  for (int64_t i = 0; i < n; ++i) {
    std::sort(wanted[i].begin(), wanted[i].end(), comes_before);
    wanted[i].resize(static_cast<size_t>(std::max(k, tiles * m)), Column(-INFINITY, -1));
    expect(target_cosine[i], wanted_target[i], 0.0, "target cosine", i, 0);
    for (int64_t s = 0; s < k; ++s) {
      expect(best[i * k + s], wanted[i][s].first, 0.0, "nearest cosine", i, s);
      expect(static_cast<float>(position[i * k + s]), static_cast<double>(wanted[i][s].second), 0.0,
             "nearest position", i, s);
    }
  }
}

void test_sizes() {
  int c = 0;
  for (const int64_t m : {1, 7, 40, 1000, 1024, 1028, 2100}) {
    for (const int64_t k : {1, 2, 31, 32, 33, 64}) {
      ++c;
      const int64_t gap = c % 4 == 1 ? 4 : c % 4 == 2 ? 1 : 0;
      test_nearest(c % 3 == 0 ? 1 : 11, m, k, gap, c % 5 == 3, c % 2 == 0 ? 6 : 0);
    }
  }
}

void test_empty() {
  NearestTileArgs args = {};
  args.k = 1;
  expect_no_launch([&] { cuda::nearest_tile(args, nullptr); }, "search");
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    test_sizes();
    test_empty();
  });
}
