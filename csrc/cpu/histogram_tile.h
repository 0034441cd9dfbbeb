// Histogram epilogue: cosines of a tile -> counts of positive and of negative pairs per bin.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "unitsface/histogram_bin.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// Zeroed counters; Workspace in sum_tile.h explains why this is not a std::vector.
class Counters {
 public:
  explicit Counters(int64_t count)
      : data_(static_cast<uint32_t*>(std::calloc(count > 0 ? count : 1, sizeof(uint32_t)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Counters() { std::free(data_); }
  Counters(const Counters&) = delete;
  Counters& operator=(const Counters&) = delete;
  uint32_t* data() { return data_; }

 private:
  uint32_t* data_;
};

constexpr int64_t kChunk = 1024;  // pairs whose counters are computed (vectorized) before counting

// The pairs of one row, without the excluded diagonal and the lower triangle.
struct RowPairs {
  int64_t first, skipped;  // columns from first on, without `skipped`
};

inline RowPairs row_pairs(const HistogramTile& t, int64_t i) {
  if (t.diagonal == INT64_MIN) return {0, -1};
  const int64_t skipped = i + t.diagonal;
  if (!t.upper) return {0, skipped};
  return {skipped < 0 ? 0 : skipped + 1, -1};
}

// Counter index of `count` pairs among [2, bins + 3] counters; one past the end: excluded pair.
inline void pair_places(const HistogramTile& t, const float* __restrict cosine, int32_t label,
                        const int32_t* __restrict labels, int32_t count, int32_t skipped,
                        int32_t* __restrict place) {
  const float low = t.low, scale = t.scale;
  const int32_t bins = static_cast<int32_t>(t.bins), slots = bins + 3;
#pragma omp simd
  for (int32_t j = 0; j < count; ++j) {
    const int32_t other = labels[j];
    const int32_t bin = score_bin(cosine[j], low, scale, bins);
    const bool valid = (other >= 0) & (j != skipped);
    place[j] = valid ? (other == label ? bin : bin + slots) : 2 * slots;
  }
}

// Calls `count_places(cosines, places, count)` for every chunk of row i.
template <class CountPlaces>
void for_places(const HistogramTile& t, int64_t i, const CountPlaces& count_places) {
  int32_t place[kChunk];
  if (t.a_labels[i] < 0) return;
  const RowPairs pairs = row_pairs(t, i);
  for (int64_t j = pairs.first; j < t.m; j += kChunk) {
    const int32_t count = static_cast<int32_t>(t.m - j < kChunk ? t.m - j : kChunk);
    const int64_t skipped = pairs.skipped - j;
    const float* cosine = t.cosines + i * t.stride + j;
    pair_places(t, cosine, t.a_labels[i], t.b_labels + j, count,
                skipped >= 0 && skipped < count ? static_cast<int32_t>(skipped) : -1, place);
    count_places(cosine, place, count);
  }
}

// Rows of a chunk. On the diagonal the number of pairs shrinks from row to row.
constexpr int64_t kRowsPerChunk = 16;

template <class Body>
void for_rows(const HistogramTile& t, int threads, const Body& body) {
  parallel_chunks((t.n + kRowsPerChunk - 1) / kRowsPerChunk, threads, [&](int64_t chunk, int slot) {
    const int64_t end = t.n < (chunk + 1) * kRowsPerChunk ? t.n : (chunk + 1) * kRowsPerChunk;
    for (int64_t i = chunk * kRowsPerChunk; i < end; ++i) body(i, slot);
  });
}

// One histogram of the tile. Neighboring scores often fall into one bin: they are counted in
// alternating histograms, so that consecutive increments do not depend on each other.
inline void count_bins(const HistogramTile& t, int threads) {
  const int64_t size = 2 * t.slots + 1;
  Counters counters(threads * 2 * size);
  for_rows(t, threads, [&](int64_t i, int slot) {
    uint32_t* even = counters.data() + slot * 2 * size;
    uint32_t* odd = even + size;
    for_places(t, i, [&](const float*, const int32_t* place, int32_t count) {
      int32_t j = 0;
      for (; j + 1 < count; j += 2) {
        ++even[place[j]];
        ++odd[place[j + 1]];
      }
      if (j < count) ++even[place[j]];
    });
  });
  // Integer sums do not depend on which thread has counted what.
  for (int64_t part = 0; part < 2 * threads; ++part) {
    const uint32_t* counted = counters.data() + part * size;
    for (int64_t k = 0; k < 2 * t.slots; ++k) t.counts[k] += static_cast<int64_t>(counted[k]);
  }
}

inline void count_bins_per_row(const HistogramTile& t, int threads) {
  for_rows(t, threads, [&](int64_t i, int) {
    int64_t* counts = t.counts + i * 2 * t.slots;
    for_places(t, i, [&](const float*, const int32_t* place, int32_t count) {
      for (int32_t j = 0; j < count; ++j) {
        if (place[j] < 2 * t.slots) ++counts[place[j]];
      }
    });
  });
}

// Few scores lie in a range, so all threads share the counters.
inline void count_ranges(const HistogramTile& t, int threads) {
  const int64_t slots = t.bins + 3;
  for_rows(t, threads, [&](int64_t i, int) {
    for_places(t, i, [&](const float* cosine, const int32_t* place, int32_t count) {
      for (int32_t j = 0; j < count; ++j) {
        if (place[j] == 2 * slots) continue;
        const bool negative = place[j] >= slots;
        const int32_t which = t.range_of_bin[negative ? place[j] - slots : place[j]];
        if (which < 0) continue;
        const ScoreRange range = t.ranges[which];
        const int64_t offset = score_key(cosine[j]) - range.low;
        if (offset < 0 || offset >= range.size) continue;
        int64_t* row = t.counts + (t.per_row ? i * 2 * t.slots : 0);
        int64_t& counter = row[(negative ? t.slots : 0) + range.first + (offset >> range.shift)];
        __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
      }
    });
  });
}

inline void histogram_tile(const HistogramTile& t, int threads) {
  if (t.range_of_bin != nullptr) {
    count_ranges(t, threads);
  } else if (t.per_row) {
    count_bins_per_row(t, threads);
  } else {
    count_bins(t, threads);
  }
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
