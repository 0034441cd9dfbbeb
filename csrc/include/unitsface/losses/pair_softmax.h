// Pair softmax (UniTSFace, Li et al., NeurIPS 2023, eq. 17).
#pragma once

#include "../policy.h"

namespace unitsface {
inline namespace UF_ISA {

// Positive: s (c - m). Negative: s c.
struct PairSoftmax {
  static constexpr int kParameters = 2;
  static constexpr bool kPositives = true;
  float scale, margin;

  UF_HOST_DEVICE explicit PairSoftmax(const float* p) : scale(p[0]), margin(p[1]) {}

  UF_HOST_DEVICE Logit positive(float cosine) const { return {scale * (cosine - margin), scale}; }
  UF_HOST_DEVICE Logit negative(float cosine) const { return {scale * cosine, scale}; }
};

}  // namespace UF_ISA
}  // namespace unitsface
