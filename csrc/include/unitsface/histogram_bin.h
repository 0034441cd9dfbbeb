// Bin of a score: monotone functions, the same on every device and in every pass.
#pragma once

#include <cstdint>
#include <cstring>

#include "unitsface/macros.h"

namespace unitsface {
inline namespace UF_ISA {

// 0 below low, 1 ... bins, bins + 1 from the high end on, bins + 2 NaN. A difference, then a
// multiplication, which no compiler may fuse, so that the rounding is the same everywhere.
UF_HOST_DEVICE int32_t score_bin(float score, float low, float scale, int32_t bins) {
  const float position = (score - low) * scale;
  const float top = static_cast<float>(bins);
  // Selected before the conversion, which is undefined for NaN and for huge numbers.
  const float inside = position >= 0.0f ? (position < top ? position : top) : 0.0f;
  const int32_t bin = score < low ? 0 : 1 + static_cast<int32_t>(inside);
  return score == score ? bin : bins + 2;
}

// Neighboring float32 values have neighboring keys; -0 and 0 share one.
UF_HOST_DEVICE int32_t score_key(float score) {
  int32_t bits;
  memcpy(&bits, &score, sizeof(bits));
  return bits >= 0 ? bits : -(bits & INT32_MAX);
}

}  // namespace UF_ISA
}  // namespace unitsface
