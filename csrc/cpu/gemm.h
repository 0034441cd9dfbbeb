// GEMM with float32 accumulation and result, for one kind of element (Element below).
//
// Both operands are packed into 32-bit words, groups of 16 rows, 16 words for each step of the
// depth, padded with zeros. A tile of the result broadcasts the words of rows of `a` and multiplies
// them with whole vectors of `b`. Every element of the result is summed in one fixed order,
// independent of the number of threads.
//
// Included by one source per instruction set: everything here has internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/pool.h"

namespace unitsface::cpu {
namespace {

constexpr int64_t kGroup = 16;       // rows of a packed group: 32-bit words of a vector
constexpr int64_t kTileRows = 8;     // of the result, in registers: 8 x 3 vectors of sums
constexpr int64_t kTileGroups = 3;   // leave room for 3 vectors of b and a broadcast word
constexpr int64_t kBlockGroups = 8;  // groups of a at a time: 64 or 128 KB, in L2

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

__mmask32 first_lanes(int64_t count) {
  if (count >= 32) return ~__mmask32{0};
  return count <= 0 ? 0 : (__mmask32{1} << count) - 1;
}

// --- packing -------------------------------------------------------------------------------------

// Words of 16 rows -> 16 rows of words, in place.
inline void transpose(__m512i* v) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {  // within 128 bits: pairs of rows, then of pairs
    t[i] =
        i % 2 == 0 ? _mm512_unpacklo_epi32(v[i], v[i + 1]) : _mm512_unpackhi_epi32(v[i - 1], v[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int even = i / 4 * 4 + i % 4 / 2;
    v[i] = i % 2 == 0 ? _mm512_unpacklo_epi64(t[even], t[even + 2])
                      : _mm512_unpackhi_epi64(t[even], t[even + 2]);
  }
  // v[4 r + c], 128 bits q: words 4 q + c of rows 4 r ... 4 r + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x88);
    t[c + 4] = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xdd);
    t[c + 8] = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x88);
    t[c + 12] = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0x88);
    v[c + 8] = _mm512_shuffle_i32x4(t[c], t[c + 8], 0xdd);
    v[c + 4] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0x88);
    v[c + 12] = _mm512_shuffle_i32x4(t[c + 4], t[c + 12], 0xdd);
  }
}

// A group whose rows are contiguous along the depth.
template <class Element>
void pack_rows(const typename Element::Type* first, int64_t stride, int64_t rows, int64_t depth,
               uint32_t* out) {
  constexpr int64_t kStep = Element::kPerWord * kGroup;
  for (int64_t k = 0; k < depth; k += kStep) {
    __m512i words[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) {
      words[i] =
          i < rows ? Element::load(first + i * stride + k, depth - k) : _mm512_setzero_si512();
    }
    transpose(words);
    const int64_t count = smaller(ceil_div(depth - k, Element::kPerWord), kGroup);
    const int64_t word = k / Element::kPerWord;
    for (int64_t w = 0; w < count; ++w) _mm512_store_si512(out + (word + w) * kGroup, words[w]);
  }
}

template <class Element>
struct Operand {
  const typename Element::Type* data;
  int64_t rows, row_stride, depth_stride;
};

// Groups 2 * pair and, if there is one, 2 * pair + 1: where rows lie side by side, a cache line.
template <class Element>
void pack(const Operand<Element>& t, int64_t pair, int64_t words, int64_t depth, uint32_t* packed) {
  const int64_t size = words * kGroup, start = 2 * pair * kGroup;
  uint32_t* out = packed + 2 * pair * size;
  if (t.depth_stride == 1) {
    for (int64_t i = start; i < smaller(start + 2 * kGroup, t.rows); i += kGroup, out += size) {
      pack_rows<Element>(t.data + i * t.row_stride, t.row_stride, smaller(t.rows - i, kGroup),
                         depth, out);
    }
  } else {
    Element::pack_columns(t.data + start, t.depth_stride, smaller(t.rows - start, 2 * kGroup),
                          depth, out, out + size);
  }
}

// --- multiplying ---------------------------------------------------------------------------------

// kTileRows rows of the result by kGroups vectors, of which `rows` rows and `columns` exist.
template <class Element, int kGroups>
void multiply(const uint32_t* a, const uint32_t* b, int64_t group_size, int64_t words, float* c,
              int64_t stride, int64_t rows, int64_t columns, bool add) {
  __m512 sum[kTileRows][kGroups];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int g = 0; g < kGroups; ++g) sum[r][g] = _mm512_setzero_ps();
  }
  for (int64_t w = 0; w < words; ++w) {
    __m512i right[kGroups];
#pragma GCC unroll 3
    for (int g = 0; g < kGroups; ++g) {
      right[g] = _mm512_load_si512(b + g * group_size + w * kGroup);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i left = _mm512_set1_epi32(static_cast<int>(a[w * kGroup + r]));
#pragma GCC unroll 3
      for (int g = 0; g < kGroups; ++g) {
        sum[r][g] = Element::multiply_add(sum[r][g], left, right[g]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 3
    for (int g = 0; g < kGroups; ++g) {
      const auto lanes = static_cast<__mmask16>(first_lanes(columns - g * kGroup));
      float* out = c + r * stride + g * kGroup;
      __m512 value = sum[r][g];
      if (add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, out));
      _mm512_mask_storeu_ps(out, lanes, value);
    }
  }
}

// Up to kBlockGroups groups of rows by up to kTileGroups groups of columns.
template <class Element>
void multiply_block(const GemmArgs& t, const uint32_t* a, const uint32_t* b, int64_t words,
                    int64_t row, int64_t column) {
  const int64_t size = words * kGroup;
  const int64_t last = smaller(row + kBlockGroups * kGroup, t.n);
  const int64_t columns = smaller(t.m - column, kTileGroups * kGroup);
  const auto run = columns > 2 * kGroup ? multiply<Element, 3>
                   : columns > kGroup   ? multiply<Element, 2>
                                        : multiply<Element, 1>;
  for (int64_t w = 0; w < words || w == 0; w += Element::kWords) {
    const int64_t count = smaller(words - w, Element::kWords);
    for (int64_t i = row; i < last; i += kTileRows) {
      const uint32_t* left = a + i / kGroup * size + w * kGroup + i % kGroup;
      run(left, b + column / kGroup * size + w * kGroup, size, count, t.out + i * t.stride + column,
          t.stride, last - i, columns, t.add || w > 0);
    }
  }
}

template <class Element>
void multiply_matrices(const GemmArgs& t, int threads) {
  using Type = typename Element::Type;
  const Operand<Element> a_rows = {static_cast<const Type*>(t.a), t.n, t.a_row, t.a_depth};
  const Operand<Element> b_rows = {static_cast<const Type*>(t.b), t.m, t.b_row, t.b_depth};
  const int64_t a_pairs = ceil_div(t.n, 2 * kGroup), b_pairs = ceil_div(t.m, 2 * kGroup);
  const int64_t words = ceil_div(t.depth, Element::kPerWord);
  auto* a = static_cast<uint32_t*>(t.workspace);
  uint32_t* b = a + ceil_div(t.n, kGroup) * words * kGroup;
  const int64_t panels = ceil_div(t.m, kTileGroups * kGroup);
  const int64_t blocks = ceil_div(t.n, kBlockGroups * kGroup);
  parallel_chunks(a_pairs + b_pairs, threads, [&](int64_t i, int) {
    if (i < a_pairs) {
      pack(a_rows, i, words, t.depth, a);
    } else {
      pack(b_rows, i - a_pairs, words, t.depth, b);
    }
  });
  parallel_chunks(blocks * panels, threads, [&](int64_t i, int) {
    multiply_block<Element>(t, a, b, words, i / panels * kBlockGroups * kGroup,
                            i % panels * kTileGroups * kGroup);
  });
}

}  // namespace
}  // namespace unitsface::cpu
