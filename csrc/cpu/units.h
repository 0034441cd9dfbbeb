// Units of rows, whose sums over columns are kept apart.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/pool.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// Rows per unit of work. Column sums are kept per unit and added in order, so that results do not
// depend on the number of threads.
constexpr int64_t kRowsPerUnit = 32;

constexpr int64_t units_of(int64_t n) { return (n + kRowsPerUnit - 1) / kRowsPerUnit; }

// body(unit, first, end, slot) for each unit of n rows of `width` elements. As few as a chunk has
// are the calling thread's: another takes longer to wake up.
template <class Body>
void parallel_units(int64_t n, int64_t width, int threads, const Body& body) {
  if (n * width <= kChunkElements) threads = 1;
  parallel_chunks(units_of(n), threads, [&](int64_t unit, int slot) {
    const int64_t first = unit * kRowsPerUnit, end = first + kRowsPerUnit;
    body(unit, first, n < end ? n : end, slot);
  });
}

// Zeroed floats. Not std::vector: its out-of-line members would be merged by the linker across
// instruction sets, and a baseline processor could run AVX-512 code.
class Workspace {
 public:
  explicit Workspace(int64_t count)
      : data_(static_cast<float*>(std::calloc(count > 0 ? count : 1, sizeof(float)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* data() { return data_; }
  float operator[](int64_t i) const { return data_[i]; }

 private:
  float* data_;
};

}  // namespace UF_ISA
}  // namespace unitsface::cpu
