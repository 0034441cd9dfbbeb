// Products of bfloat16 matrices with float32 sums and results (AVX512-BF16).
//
// The libraries that Torch brings round such products to bfloat16, which would cost the cosines
// more than their operands' rounding does. vdpbf16ps adds to each float32 lane the products of two
// neighbouring bfloat16, so both operands are packed into words of two elements along the depth:
// groups of 16 rows, 16 words for each pair of depths, padded with zeros. A tile of the result
// broadcasts the words of rows of `a` and multiplies them with whole vectors of `b`.
//
// Nothing inline of another header is used here: the linker could keep this set's copy of it.
// Every element of the result is a sum in one fixed order, whichever thread computes it.
#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels.h"

namespace unitsface::cpu {
namespace {

constexpr int64_t kGroup = 16;       // rows of a packed group: 32-bit words of a vector
constexpr int64_t kTileRows = 8;     // of the result, in registers: 8 x 3 vectors of sums
constexpr int64_t kTileGroups = 3;   // leave room for 3 vectors of b and a broadcast word
constexpr int64_t kPairs = 128;      // of depths at a time: 3 groups of b are 24 KB, in L1
constexpr int64_t kBlockGroups = 8;  // groups of a at a time: 64 KB, in L2

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

__mmask32 first_lanes(int64_t count) {
  if (count >= 32) return ~__mmask32{0};
  return count <= 0 ? 0 : (__mmask32{1} << count) - 1;
}

// --- packing
// --------------------------------------------------------------------------------------

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
void pack_rows(const uint16_t* first, int64_t stride, int64_t rows, int64_t depth, uint32_t* out) {
  for (int64_t k = 0; k < depth; k += 2 * kGroup) {
    __m512i words[kGroup];
    const __mmask32 inside = first_lanes(depth - k);
    for (int64_t i = 0; i < kGroup; ++i) {
      words[i] = i < rows ? _mm512_maskz_loadu_epi16(inside, first + i * stride + k)
                          : _mm512_setzero_si512();
    }
    transpose(words);
    const int64_t pairs = smaller(ceil_div(depth - k, 2), kGroup);
    for (int64_t p = 0; p < pairs; ++p) _mm512_store_si512(out + (k / 2 + p) * kGroup, words[p]);
  }
}

// Two neighbouring groups whose rows are contiguous along each other: a cache line per depth.
void pack_columns(const uint16_t* first, int64_t stride, int64_t rows, int64_t depth, uint32_t* out,
                  uint32_t* next) {
  const __mmask32 inside = first_lanes(rows);
  for (int64_t k = 0; k < depth; k += 2) {
    const uint16_t* line = first + k * stride;
    const __m512i even = _mm512_maskz_loadu_epi16(inside, line);
    const __m512i odd =
        k + 1 < depth ? _mm512_maskz_loadu_epi16(inside, line + stride) : _mm512_setzero_si512();
    const auto words = [&](int half) {
      const __m256i low =
          half == 0 ? _mm512_castsi512_si256(even) : _mm512_extracti64x4_epi64(even, 1);
      const __m256i high =
          half == 0 ? _mm512_castsi512_si256(odd) : _mm512_extracti64x4_epi64(odd, 1);
      return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                             _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    };
    _mm512_store_si512(out + k / 2 * kGroup, words(0));
    if (rows > kGroup) _mm512_store_si512(next + k / 2 * kGroup, words(1));
  }
}

struct Operand {
  const uint16_t* data;
  int64_t rows, row_stride, depth_stride;
};

// Groups 2 * pair and, if there is one, 2 * pair + 1.
void pack(const Operand& t, int64_t pair, int64_t depth, uint32_t* packed) {
  const int64_t size = ceil_div(depth, 2) * kGroup, start = 2 * pair * kGroup;
  uint32_t* out = packed + 2 * pair * size;
  if (t.depth_stride == 1) {
    for (int64_t i = start; i < smaller(start + 2 * kGroup, t.rows); i += kGroup, out += size) {
      pack_rows(t.data + i * t.row_stride, t.row_stride, smaller(t.rows - i, kGroup), depth, out);
    }
  } else {
    pack_columns(t.data + start, t.depth_stride, smaller(t.rows - start, 2 * kGroup), depth, out,
                 out + size);
  }
}

// --- multiplying ---------------------------------------------------------------------------------

// kTileRows rows of the result by kGroups vectors, of which `rows` rows and `columns` exist.
template <int kGroups>
void multiply(const uint32_t* a, const uint32_t* b, int64_t group_size, int64_t pairs, float* c,
              int64_t stride, int64_t rows, int64_t columns, bool add) {
  __m512 sum[kTileRows][kGroups];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int g = 0; g < kGroups; ++g) sum[r][g] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh right[kGroups];
#pragma GCC unroll 3
    for (int g = 0; g < kGroups; ++g) {
      right[g] = (__m512bh)_mm512_load_si512(b + g * group_size + p * kGroup);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[p * kGroup + r]));
#pragma GCC unroll 3
      for (int g = 0; g < kGroups; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], left, right[g]);
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
void multiply_block(const Bf16ProductArgs& t, const uint32_t* a, const uint32_t* b, int64_t row,
                    int64_t column) {
  const int64_t size = ceil_div(t.depth, 2) * kGroup;
  const int64_t last = smaller(row + kBlockGroups * kGroup, t.n);
  const int64_t columns = smaller(t.m - column, kTileGroups * kGroup);
  const auto run = columns > 2 * kGroup ? multiply<3>
                   : columns > kGroup   ? multiply<2>
                                        : multiply<1>;
  for (int64_t p = 0; p < size / kGroup || p == 0; p += kPairs) {
    const int64_t pairs = smaller(size / kGroup - p, kPairs);
    for (int64_t i = row; i < last; i += kTileRows) {
      const uint32_t* words = a + i / kGroup * size + p * kGroup + i % kGroup;
      run(words, b + column / kGroup * size + p * kGroup, size, pairs,
          t.out + i * t.stride + column, t.stride, last - i, columns, t.add || p > 0);
    }
  }
}

}  // namespace

int64_t bf16_product_scratch(int64_t n, int64_t m, int64_t depth) {
  return (ceil_div(n, kGroup) + ceil_div(m, kGroup)) * kGroup * 2 * ceil_div(depth, 2);
}

void bf16_product(const Bf16ProductArgs& t, int threads) {
  const Operand a_rows = {t.a, t.n, t.a_row, t.a_depth};
  const Operand b_rows = {t.b, t.m, t.b_row, t.b_depth};
  const int64_t a_pairs = ceil_div(t.n, 2 * kGroup), b_pairs = ceil_div(t.m, 2 * kGroup);
  const int64_t size = ceil_div(t.depth, 2) * kGroup;
  auto* a = static_cast<uint32_t*>(t.scratch);
  uint32_t* b = a + ceil_div(t.n, kGroup) * size;
  const int64_t panels = ceil_div(t.m, kTileGroups * kGroup);
  const int64_t blocks = ceil_div(t.n, kBlockGroups * kGroup);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a_pairs + b_pairs; ++i) {
      if (i < a_pairs) {
        pack(a_rows, i, t.depth, a);
      } else {
        pack(b_rows, i - a_pairs, t.depth, b);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * panels; ++i) {
      multiply_block(t, a, b, i / panels * kBlockGroups * kGroup,
                     i % panels * kTileGroups * kGroup);
    }
  }
}

}  // namespace unitsface::cpu
