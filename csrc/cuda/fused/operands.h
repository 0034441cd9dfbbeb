// What the kernels multiply that compute their cosines themselves.
#pragma once

#include <cstdint>

#include "unitsface/tile_args.h"

namespace unitsface::cuda {

// Rows contiguous in the depth. Strides are in elements; neither they nor the addresses need any
// alignment beyond an element's, but copies are wide only where rows start at multiples of 16
// bytes.
struct FusedOperands {
  const void *a, *b;  // [n, depth], [m, depth]
  DType dtype;        // of both
  bool tf32;          // float32 is rounded to TF32 before it is multiplied
  int64_t depth, a_stride, b_stride;
};

// Instructions that a fused kernel is made of.
enum class Arch : int { kSm80 = 0, kSm90 = 1 };

}  // namespace unitsface::cuda
