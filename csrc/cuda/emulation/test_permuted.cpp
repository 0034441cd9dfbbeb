// permuted: a bijection of places and classes; classes outside the range are marked.

#include "checks.h"

namespace {

using namespace unitsface;
using namespace unitsface::checks;

void test_permutation(int64_t size, uint64_t key) {
  const uint64_t count = static_cast<uint64_t>(size);
  // One element more at either end, which no thread may touch.
  Buffer<int64_t> classes(size + 2, -7);
  cuda::permuted({key, count, nullptr, size, classes.data + 1}, nullptr);
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
  cuda::permuted({key, count, classes.data + 1, size, places.data}, nullptr);
  for (int64_t i = 0; i < size; ++i) expect(places[i] == i, 1.0, 0.0, "place", size, i);
}

void test_outside() {
  const int64_t size = 100;
  Buffer<int64_t> classes(6, 0), places(6, -7);
  const int64_t strangers[] = {-1, -2, size, 2 * size - 1, INT64_MIN, INT64_MAX};
  std::copy(strangers, strangers + 6, classes.data);
  cuda::permuted({3, size, classes.data, 6, places.data}, nullptr);
  for (int64_t i = 0; i < 6; ++i) expect(places[i] == size, 1.0, 0.0, "place outside", size, i);
  Buffer<int64_t> none(1, -1), place(1, -7);
  cuda::permuted({3, 0, none.data, 1, place.data}, nullptr);
  expect(place[0] == 0, 1.0, 0.0, "place among no classes", 0, 0);
}

}  // namespace

int main(int argc, char**) {
  return checks::run(argc, [] {
    for (const int64_t size : {1, 2, 3, 5, 7, 64, 65, 255, 256, 257, 1000, 4097}) {
      test_permutation(size, 0);
      test_permutation(size, 0x123456789abcdef0u + static_cast<uint64_t>(size));
    }
    test_outside();
    expect_no_launch([] { cuda::permuted({}, nullptr); }, "draw");
  });
}
