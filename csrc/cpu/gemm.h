// GEMM with float32 accumulation and result, for one kind of element and of vector (Element below).
//
// Operands are packed into 32-bit words, groups of as many rows as a vector has words, that many
// words for each step of the depth, padded with zeros; `a` only where its rows are not contiguous.
// A tile of the result broadcasts the words of rows of `a` and multiplies them with whole vectors
// of `b`. Every element of the result is summed in one fixed order, independent of the number of
// threads.
//
// Included by one source per instruction set: everything here has internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/pool.h"

namespace unitsface::cpu {
namespace {

constexpr int kTileGroups = 3;  // vectors of b: sums, these and a broadcast word fill the registers
// Multiplications of a block that take some 10 microseconds.
constexpr int64_t kLeastWork = 1 << 19;

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// What a kind of element has unless it says otherwise.
struct Defaults {
  static constexpr int kGroups = kTileGroups;     // of b: the columns of a block
  static constexpr int64_t kBlockRows = 128;      // of a, at most, at a time: 64 or 128 KB, in L2
  static constexpr int64_t kWordMultiple = 1;     // words of packed operands are padded to
  static constexpr int64_t kRowMultiple = 1;      // of rows of `a` that are read as they are
  static void finish_left(uint32_t*, int64_t) {}  // a packed group of `a`, its words
};

// --- packing -------------------------------------------------------------------------------------

// A group whose rows are contiguous along the depth.
template <class Element>
void pack_rows(const typename Element::Type* first, int64_t stride, int64_t rows, int64_t depth,
               uint32_t* out) {
  constexpr int64_t kGroup = Element::kGroup, kStep = Element::kPerWord * kGroup;
  for (int64_t k = 0; k < depth; k += kStep) {
    typename Element::Words words[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) {
      words[i] = i < rows ? Element::load(first + i * stride + k, depth - k) : Element::zero();
    }
    Element::transpose(words);
    const int64_t count = smaller(ceil_div(depth - k, Element::kPerWord), kGroup);
    const int64_t word = k / Element::kPerWord;
    for (int64_t w = 0; w < count; ++w) Element::store(out + (word + w) * kGroup, words[w]);
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
  constexpr int64_t kGroup = Element::kGroup;
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

inline uint32_t word_at(const char* place) {
  uint32_t word;
  __builtin_memcpy(&word, place, sizeof word);
  return word;
}

// Element::kTileRows rows of the result by kGroups vectors, of which `rows` rows and `columns`
// exist. `a` is packed, or has rows as they are, `a_row` bytes apart.
template <class Element, int kGroups, bool kPacked>
void multiply(const char* a, int64_t a_row, const uint32_t* b, int64_t group_size, int64_t words,
              float* c, int64_t stride, int64_t rows, int64_t columns, bool add) {
  constexpr int64_t kGroup = Element::kGroup;
  constexpr int kTileRows = Element::kTileRows;
  constexpr int64_t kStep = 4 * (kPacked ? kGroup : 1);
  const char* line[kTileRows];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    line[r] = a + (kPacked ? 4 * r : smaller(r, rows - 1) * a_row);
  }
  typename Element::Sums sum[kTileRows][kGroups];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int g = 0; g < kGroups; ++g) sum[r][g] = typename Element::Sums{};
  }
  for (int64_t w = 0; w < words; ++w) {
    typename Element::Words right[kGroups];
#pragma GCC unroll 3
    for (int g = 0; g < kGroups; ++g) right[g] = Element::words(b + g * group_size + w * kGroup);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const auto left = Element::broadcast(word_at(line[r] + w * kStep));
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
      Element::write(c + r * stride + g * kGroup, sum[r][g], columns - g * kGroup, add);
    }
  }
}

// `rows` rows, if there are as many, by up to kTileGroups groups of columns.
template <class Element, bool kPacked>
void multiply_block(const GemmArgs& t, const uint32_t* a, const uint32_t* b, int64_t words,
                    int64_t row, int64_t rows, int64_t column) {
  constexpr int64_t kGroup = Element::kGroup;
  const int64_t size = words * kGroup, a_row = t.a_row * 4 / Element::kPerWord;
  const int64_t last = smaller(row + rows, t.n);
  const int64_t columns = smaller(t.m - column, Element::kGroups * kGroup);
  const auto run = columns > 2 * kGroup ? multiply<Element, 3, kPacked>
                   : columns > kGroup   ? multiply<Element, 2, kPacked>
                                        : multiply<Element, 1, kPacked>;
  for (int64_t w = 0; w < words || w == 0; w += Element::kWords) {
    const int64_t count = smaller(words - w, Element::kWords);
    for (int64_t i = row; i < last; i += Element::kTileRows) {
      const char* left =
          kPacked ? reinterpret_cast<const char*>(a + i / kGroup * size + w * kGroup + i % kGroup)
                  : static_cast<const char*>(t.a) + i * a_row + 4 * w;
      run(left, a_row, b + column / kGroup * size + w * kGroup, size, count,
          t.out + i * t.stride + column, t.stride, last - i, columns, t.add || w > 0);
    }
  }
}

// A GEMM as both loops run it: over pairs of groups to pack, and over blocks of the result.
template <class Element>
struct Packed {
  GemmArgs t;
  int64_t words, a_pairs, b_pairs, panels, rows;  // a_pairs: 0 if rows of `a` are read as they are
  uint32_t *a, *b;

  static constexpr int64_t kGroup = Element::kGroup, kWidth = Element::kGroups * kGroup;

  int64_t pairs() const { return a_pairs + b_pairs; }
  int64_t a_words() const { return a_pairs > 0 ? ceil_div(t.n, kGroup) * kGroup * words : 0; }
  int64_t b_words() const { return ceil_div(t.m, kGroup) * kGroup * words; }
  int64_t blocks() const { return ceil_div(t.n, rows) * panels; }

  void pack_pair(int64_t i) const {
    using Type = typename Element::Type;
    const bool left = i < a_pairs;
    const Operand<Element> operand =
        left ? Operand<Element>{static_cast<const Type*>(t.a), t.n, t.a_row, t.a_depth}
             : Operand<Element>{static_cast<const Type*>(t.b), t.m, t.b_row, t.b_depth};
    const int64_t pair = left ? i : i - a_pairs;
    pack(operand, pair, words, t.depth, left ? a : b);
    const int64_t filled = ceil_div(t.depth, Element::kPerWord);
    for (int64_t g = 2 * pair; g < 2 * pair + 2 && g * kGroup < operand.rows; ++g) {
      uint32_t* group = (left ? a : b) + g * words * kGroup;
      for (int64_t w = filled; w < words; ++w) Element::store(group + w * kGroup, Element::zero());
      if (left) Element::finish_left(group, words);
    }
  }

  void multiply_one(int64_t i) const {
    const auto run = a_pairs > 0 ? multiply_block<Element, true> : multiply_block<Element, false>;
    run(t, a, b, words, i / panels * rows, rows, i % panels * kWidth);
  }
};

// Both loops are common to all GEMMs: a thread waits for two ends, whatever their number.
template <class Element>
void multiply_matrices(const GemmArgs* gemms, int64_t count, int threads) {
  constexpr int64_t kGroup = Element::kGroup;
  Packed<Element> all[kMostGemms];
  int64_t packed = 0, pairs = 0, work = 0;
  for (int64_t k = 0; k < count; ++k) {
    const GemmArgs& t = gemms[k];
    Packed<Element>& p = all[k];
    p.t = t;
    p.words = ceil_div(ceil_div(t.depth, Element::kPerWord), Element::kWordMultiple) *
              Element::kWordMultiple;
    // Rows of `a` are read as they are if their words are whole and side by side.
    const bool as_it_is = t.a_depth == 1 && t.depth == p.words * Element::kPerWord &&
                          t.n % Element::kRowMultiple == 0;
    p.a_pairs = as_it_is ? 0 : ceil_div(t.n, 2 * kGroup);
    p.b_pairs = ceil_div(t.m, 2 * kGroup);
    p.panels = ceil_div(t.m, Packed<Element>::kWidth);
    p.rows = Element::kBlockRows;
    packed += p.a_words() + p.b_words();
    pairs += p.pairs();
    work += t.n * t.m * t.depth;
  }
  if (work < 2 * kLeastWork) threads = 1;  // another takes longer to wake up
  int64_t blocks = 0;
  uint32_t* next = gemm_workspace(packed);
  for (int64_t k = 0; k < count; ++k) {
    Packed<Element>& p = all[k];
    p.a = next;
    p.b = p.a + p.a_words();
    next = p.b + p.b_words();
    // Several blocks for each of many threads. In what order an element is summed does not change.
    while (p.rows > 16 && p.rows * Packed<Element>::kWidth * p.t.depth > 2 * kLeastWork &&
           p.blocks() * count < 4 * threads) {
      p.rows /= 2;
    }
    blocks += p.blocks();
  }
  // The GEMM of a chunk, and the chunk's number among its own.
  const auto each = [&](int64_t total, auto chunks, auto run) {
    parallel_chunks(total, threads, [&](int64_t i, int) {
      const Packed<Element>* p = all;
      for (; i >= (p->*chunks)(); ++p) i -= (p->*chunks)();
      (p->*run)(i);
    });
  };
  each(pairs, &Packed<Element>::pairs, &Packed<Element>::pack_pair);
  each(blocks, &Packed<Element>::blocks, &Packed<Element>::multiply_one);
}

}  // namespace
}  // namespace unitsface::cpu
