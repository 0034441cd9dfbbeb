// Evaluates a permutation of the classes, and its inverse.
#pragma once

#include <cstdint>

#include "cpu/pool.h"
#include "unitsface/permutation.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

inline void permuted(const PermutedArgs& t, int threads) {
  const Permutation permutation(t.size, t.key);
  const Draw draw(t);
  // An element is some dozens of operations.
  parallel_rows(t.n, 16, threads, [&](int64_t i) { t.out[i] = permutation.permuted(t, draw, i); });
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
