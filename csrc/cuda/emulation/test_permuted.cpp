// permuted: a bijection of places and classes; classes outside the range are marked.

#include <algorithm>
#include <vector>

#include "checks.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

void test_permutation(int64_t size, uint64_t key) {
  const uint64_t count = static_cast<uint64_t>(size);
  // One element more at either end, which no thread may touch.
  Buffer<int64_t> classes(size + 2, -7);
  cuda::permuted({key, count, nullptr, nullptr, 0, size, classes.data + 1}, nullptr);
  std::vector<int> seen(size, 0);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = classes[i + 1];
    const bool inside = c >= 0 && c < size;
    expect(inside, 1.0, 0.0, "class in range", size, i);
    if (inside) ++seen[c];
  }
  for (int64_t c = 0; c < size; ++c) expect(seen[c], 1.0, 0.0, "occurrences of class", size, c);
  expect(classes[0] == -7 && classes[size + 1] == -7, 1.0, 0.0, "elements beside", size, 0);

  Buffer<int64_t> places(size, -7);
  cuda::permuted({key, count, classes.data + 1, nullptr, 0, size, places.data}, nullptr);
  for (int64_t i = 0; i < size; ++i) expect(places[i] == i, 1.0, 0.0, "place", size, i);
}

void test_outside() {
  const int64_t size = 100;
  Buffer<int64_t> classes(6, 0), places(6, -7);
  const int64_t strangers[] = {-1, -2, size, 2 * size - 1, INT64_MIN, INT64_MAX};
  std::copy(strangers, strangers + 6, classes.data);
  cuda::permuted({3, size, classes.data, nullptr, 0, 6, places.data}, nullptr);
  for (int64_t i = 0; i < 6; ++i) expect(places[i] == size, 1.0, 0.0, "place outside", size, i);
  Buffer<int64_t> none(1, -1), place(1, -7);
  cuda::permuted({3, 0, none.data, nullptr, 0, 1, place.data}, nullptr);
  expect(place[0] == 0, 1.0, 0.0, "place among no classes", 0, 0);
}

// Every third place is a positive, at most `most` of them; `none` elements follow that are none.
void test_draw(int64_t size, int64_t count, int64_t most, int64_t none) {
  std::vector<int64_t> wanted;
  for (int64_t place = 1; place < size && static_cast<int64_t>(wanted.size()) < most; place += 3) {
    wanted.push_back(place);
  }
  const int64_t known = static_cast<int64_t>(wanted.size());
  Buffer<int64_t> positives(known + none, size), drawn(count, -7), order(size, -7);
  std::copy(wanted.begin(), wanted.end(), positives.data);
  const uint64_t classes = static_cast<uint64_t>(size);
  cuda::permuted({7, classes, nullptr, positives.data, known + none, count, drawn.data}, nullptr);
  cuda::permuted({7, classes, nullptr, nullptr, 0, size, order.data}, nullptr);
  // As many others as there is room for, each at its place in the permutation.
  std::vector<int64_t> places;
  int64_t others = count - known;
  for (int64_t place = 0; place < size; ++place) {
    const bool positive = std::find(wanted.begin(), wanted.end(), place) != wanted.end();
    if (positive || others-- > 0) places.push_back(place);
  }
  expect(places.size() == static_cast<size_t>(count), 1.0, 0.0, "places", size, count);
  for (int64_t i = 0; i < count; ++i) {
    expect(drawn[i] == order[places[i]], 1.0, 0.0, "drawn class", size, i);
  }
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    for (const int64_t size : {1, 2, 3, 5, 7, 64, 65, 255, 256, 257, 1000, 4097}) {
      test_permutation(size, 0);
      test_permutation(size, 0x123456789abcdef0u + static_cast<uint64_t>(size));
    }
    test_outside();
    for (const int64_t count : {1, 7, 40, 299, 300}) {
      for (const int64_t most : {0, 1, 7, 100}) {
        if (most <= count) test_draw(300, count, most, 2);
      }
    }
    expect_no_launch([] { cuda::permuted({}, nullptr); }, "draw");
  });
}
