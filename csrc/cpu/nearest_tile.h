// Top-k search for each row's nearest wrong columns; independent of the loss.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/pool.h"
#include "unitsface/macros.h"
#include "unitsface/tile_args.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

// NaN is ordered before every number.
inline bool comes_before(float x, float y) { return x > y || (x != x && y == y); }

// True if one of `size` cosines may enter the top-k, that is, come before `last`. After a few tiles
// this is rare, and this loop is the whole cost of most columns.
inline bool any_comes_before(const float* cosine, int64_t size, float last) {
  if (last != last) return false;
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t j = 0; j < size; ++j) any |= !(cosine[j] <= last);
  return any != 0;
}

// Replaces the last of `k` and sorts in behind equal cosines, which have smaller positions.
inline void insert_cosine(float cosine, int32_t position, int64_t k, float* best,
                          int32_t* positions) {
  int64_t place = k - 1;
  for (; place > 0 && comes_before(cosine, best[place - 1]); --place) {
    best[place] = best[place - 1];
    positions[place] = positions[place - 1];
  }
  best[place] = cosine;
  positions[place] = position;
}

inline void nearest_tile(const NearestTileArgs& t, int threads) {
  constexpr int64_t kBlock = 128;  // columns per test against the top-k
  parallel_rows(t.n, t.m, threads, [&](int64_t i) {
    float* row = t.cosines + i * t.stride;
    float* best = t.best + i * t.k;
    int32_t* positions = t.position + i * t.k;
    const int64_t target = t.targets[i] - t.start;
    if (t.targets[i] >= 0 && target >= 0 && target < t.m) {
      t.target_cosine[i] = row[target];
      row[target] = -INFINITY;  // never enters the top-k
    }
    for (int64_t first = 0; first < t.m; first += kBlock) {
      const int64_t size = t.m - first < kBlock ? t.m - first : kBlock;
      if (!any_comes_before(row + first, size, best[t.k - 1])) continue;
      for (int64_t j = first; j < first + size; ++j) {
        if (comes_before(row[j], best[t.k - 1])) {
          insert_cosine(row[j], static_cast<int32_t>(t.start + j), t.k, best, positions);
        }
      }
    }
  });
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
