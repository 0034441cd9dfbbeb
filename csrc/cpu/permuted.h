// Evaluates a permutation of the classes, and its inverse.
#pragma once

#include <cstdint>

#include "unitsface/permutation.h"

namespace unitsface::cpu {
inline namespace UF_ISA {

inline void permuted(const PermutedArgs& t, int threads) {
  const Permutation permutation(t.size, t.key);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < t.n; ++i) t.out[i] = permutation.permuted(t, i);
}

}  // namespace UF_ISA
}  // namespace unitsface::cpu
