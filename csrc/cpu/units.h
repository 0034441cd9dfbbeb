// Units of rows, whose sums over columns are kept apart.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace unitsface::cpu {
inline namespace UF_ISA {

// Rows per unit of work. Column sums are kept per unit and added in order, so that results do not
// depend on the number of threads.
constexpr int64_t kRowsPerUnit = 32;

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
