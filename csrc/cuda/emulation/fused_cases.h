// Shared by the tests of the fused kernels: operands, their products in loops, and the comparison
// with the kernels that read cosines from memory, which tests of their own compare with loops.
#pragma once

#include "checks.h"
#include "cuda/fused/kernels.h"

namespace unitsface::checks {

struct Kind {
  DType dtype;
  bool tf32;
};
inline const Kind kKinds[] = {{DType::kBFloat16, false},
                              {DType::kFloat16, false},
                              {DType::kFloat32, true},
                              {DType::kFloat32, false}};

// Unit rows of `depth` in buffers of exactly their size, `gap` elements apart.
struct Operands {
  Kind kind;
  int64_t n, m, depth, stride;
  Buffer<char> a, b;

  Operands(Kind k, int64_t rows, int64_t columns, int64_t size, int64_t gap)
      : kind(k),
        n(rows),
        m(columns),
        depth(size),
        stride(size + gap),
        a(bytes(rows), 0),
        b(bytes(columns), 0) {
    fill(a, n);
    fill(b, m);
  }

  cuda::FusedOperands given() const {
    return {a.data, b.data, kind.dtype, kind.tf32, depth, stride, stride};
  }

  // In the order of the depth; TF32 keeps 10 bits.
  std::vector<float> cosines() const {
    std::vector<float> result(n * m);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        double sum = 0.0;
        for (int64_t k = 0; k < depth; ++k) {
          sum += static_cast<double>(rounded(a, i * stride + k)) * rounded(b, j * stride + k);
        }
        result[i * m + j] = static_cast<float>(sum);
      }
    }
    return result;
  }

  // NaN in rows and columns that are ignored.
  void spoil(const Buffer<int64_t>& a_labels, const Buffer<int64_t>& b_labels) {
    spoil(a, a_labels);
    spoil(b, b_labels);
  }

  // The cosines, with rows `row_stride` apart.
  std::vector<float> spread(int64_t row_stride) const {
    const std::vector<float> dense = cosines();
    std::vector<float> result(n * row_stride);
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(dense.begin() + i * m, m, result.begin() + i * row_stride);
    }
    return result;
  }

 private:
  int64_t bytes(int64_t rows) const { return ((rows - 1) * stride + depth) * bytes_of(kind.dtype); }

  void fill(Buffer<char>& rows, int64_t count) {
    for (int64_t k = 0; k < rows.size / bytes_of(kind.dtype); ++k) {
      set_element(rows.data, kind.dtype, k, 1e4f);  // between rows
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < depth; ++k) {
        const float scale = 1.7f / std::sqrt(static_cast<float>(depth));
        set_element(rows.data, kind.dtype, i * stride + k, scale * uniform(-1.0f, 1.0f));
      }
    }
  }

  void spoil(Buffer<char>& rows, const Buffer<int64_t>& labels) const {
    for (int64_t i = 0; i < labels.size; ++i) {
      if (labels.data[i] < 0) set_element(rows.data, kind.dtype, i * stride, kNaN);
    }
  }

  float rounded(const Buffer<char>& rows, int64_t k) const {
    const float value = element(rows.data, kind.dtype, k);
    if (!kind.tf32) return value;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x1000u) & ~0x1fffu;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  }
};

template <class T>
void expect_same(Buffer<T>& got, Buffer<T>& wanted, double tolerance, const std::string& what) {
  for (int64_t k = 0; k < wanted.size; ++k) expect(got[k], wanted[k], tolerance, what, k, 0);
}

// Gradient tiles [n, m], stride: what lies between rows stays. Where both round, either may have
// the next number of its type.
inline void expect_same_gradient(const Buffer<char>& got, const Buffer<char>& wanted, DType dtype,
                                 int64_t m, int64_t stride, const std::string& what) {
  for (int64_t k = 0; k < wanted.size / bytes_of(dtype); ++k) {
    const bool between = k % stride >= m;
    expect(element(got.data, dtype, k), element(wanted.data, dtype, k),
           between ? 0.0 : 1.6 * tolerance_of(dtype), between ? what + " between rows" : what,
           k / stride, k % stride);
  }
}

}  // namespace unitsface::checks
