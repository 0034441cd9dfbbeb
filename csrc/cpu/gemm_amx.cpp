// GEMM of bfloat16 matrices (AMX).
//
// A tile register has 16 rows of 16 words. One instruction multiplies a tile of rows of `a` with a
// tile of `b`, 16 words of the depth by 16 columns, as groups are packed, and adds the products to
// a tile of float32 sums.
#include "cpu/gemm_bf16.h"

namespace unitsface::cpu {
namespace {

struct Amx : PackedBFloat16 {
  static constexpr int kGroups = 2;     // 4 tiles of sums, 2 of a, 2 of b
  static constexpr int64_t kTile = 16;  // rows of a tile, and words of one
  static constexpr int64_t kBlockRows = 256;
  static constexpr int64_t kWordMultiple = kTile, kRowMultiple = kTile;
  static constexpr int64_t kWords = 256;  // of the depth at a time: 2 groups of b are 32 KB, in L1

  // Words of 16 rows -> 16 rows of words, tile by tile.
  static void finish_left(uint32_t* packed, int64_t words) {
    for (int64_t w = 0; w < words; w += kTile) {
      __m512i tile[kTile];
      for (int64_t i = 0; i < kTile; ++i) tile[i] = Avx512::words(packed + (w + i) * kTile);
      transpose(tile);
      for (int64_t i = 0; i < kTile; ++i) store(packed + (w + i) * kTile, tile[i]);
    }
  }
};

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A tile of sums, or the part of it that exists.
struct Sums {
  float* out;
  int64_t stride, rows, columns;
  bool add;

  bool whole() const { return rows >= Amx::kTile && columns >= Amx::kTile; }

  void write(const float* sums) const {
    for (int64_t r = 0; r < smaller(rows, Amx::kTile); ++r) {
      Amx::write(out + r * stride, _mm512_load_ps(sums + r * Amx::kTile), columns, add);
    }
  }
};

// Register numbers are constants of the instructions.
#define UF_BEGIN(tile, sums)                          \
  if ((sums).add && (sums).whole()) {                 \
    _tile_loadd(tile, (sums).out, 4 * (sums).stride); \
  } else {                                            \
    _tile_zero(tile);                                 \
  }
#define UF_END(tile, sums)                             \
  if ((sums).whole()) {                                \
    _tile_stored(tile, (sums).out, 4 * (sums).stride); \
  } else {                                             \
    _tile_stored(tile, buffer, 64);                    \
    (sums).write(buffer);                              \
  }

// Up to two tiles of rows of `a`, `next` bytes apart, by up to two groups of `b`.
template <bool kRows, bool kColumns>
void multiply_tiles(const char* a, int64_t a_row, int64_t a_step, int64_t next, const uint32_t* b,
                    int64_t group_size, int64_t words, const Sums& first) {
  alignas(64) float buffer[Amx::kTile * Amx::kTile];
  Sums right = first, below = first;
  right.out += Amx::kTile, right.columns -= Amx::kTile;
  below.out += Amx::kTile * first.stride, below.rows -= Amx::kTile;
  Sums last = below;
  last.out += Amx::kTile, last.columns -= Amx::kTile;
  UF_BEGIN(0, first)
  if constexpr (kColumns) UF_BEGIN(1, right)
  if constexpr (kRows) UF_BEGIN(2, below)
  if constexpr (kRows && kColumns) UF_BEGIN(3, last)
  for (int64_t w = 0; w < words; w += Amx::kTile) {
    const char* left = a + w / Amx::kTile * a_step;
    const uint32_t* group = b + w * Amx::kTile;
    _tile_loadd(4, left, a_row);
    _tile_loadd(6, group, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns) {
      _tile_loadd(7, group + group_size, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows) {
      _tile_loadd(5, left + next, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  UF_END(0, first)
  if constexpr (kColumns) UF_END(1, right)
  if constexpr (kRows) UF_END(2, below)
  if constexpr (kRows && kColumns) UF_END(3, last)
}

#undef UF_BEGIN
#undef UF_END

template <bool kPacked>
void multiply_rows(const GemmArgs& t, const uint32_t* a, const uint32_t* b, int64_t words,
                   int64_t row, int64_t rows, int64_t column) {
  constexpr int64_t kTile = Amx::kTile;
  static constexpr TileConfiguration configuration{};
  _tile_loadconfig(&configuration);
  const int64_t size = words * kTile, last = smaller(row + rows, t.n);
  const int64_t columns = smaller(t.m - column, Amx::kGroups * kTile);
  const char* left = kPacked ? reinterpret_cast<const char*>(a) : static_cast<const char*>(t.a);
  // Bytes from a row of a tile, a step of the depth and a tile of rows to the next one.
  const int64_t a_row = kPacked ? 64 : 2 * t.a_row, a_step = kPacked ? 64 * kTile : 64;
  const int64_t next = kPacked ? 4 * size : kTile * a_row;
  for (int64_t w = 0; w < words || w == 0; w += Amx::kWords) {
    const int64_t count = smaller(words - w, Amx::kWords);
    for (int64_t i = row; i < last; i += 2 * kTile) {
      const Sums sums{t.out + i * t.stride + column, t.stride, last - i, columns, t.add || w > 0};
      const bool below = last - i > kTile;
      const auto run = columns > kTile
                           ? (below ? multiply_tiles<true, true> : multiply_tiles<false, true>)
                           : (below ? multiply_tiles<true, false> : multiply_tiles<false, false>);
      run(left + i / kTile * next + w / kTile * a_step, a_row, a_step, next,
          b + column / kTile * size + w * kTile, size, count, sums);
    }
  }
  _tile_release();
}

template <>
void multiply_block<Amx, true>(const GemmArgs& t, const uint32_t* a, const uint32_t* b,
                               int64_t words, int64_t row, int64_t rows, int64_t column) {
  multiply_rows<true>(t, a, b, words, row, rows, column);
}

template <>
void multiply_block<Amx, false>(const GemmArgs& t, const uint32_t* a, const uint32_t* b,
                                int64_t words, int64_t row, int64_t rows, int64_t column) {
  multiply_rows<false>(t, a, b, words, row, rows, column);
}

}  // namespace

void gemm_amx(const GemmArgs* gemms, int64_t count, int threads) {
  multiply_matrices<Amx>(gemms, count, threads);
}

}  // namespace unitsface::cpu
