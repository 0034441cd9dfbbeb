// Circle (Sun et al., CVPR 2020, eq. 6): weights of pairs are constants of the gradient.
#pragma once

#include "../policy.h"

namespace unitsface {
inline namespace UF_ISA {

// Positive: -s [1 + m - c]_+ (c - (1 - m)). Negative: s [c + m]_+ (c - m).
struct Circle {
  static constexpr int kParameters = 2;
  static constexpr bool kPositives = true;
  float scale, margin;

  UF_HOST_DEVICE explicit Circle(const float* p) : scale(p[0]), margin(p[1]) {}

  UF_HOST_DEVICE Logit positive(float cosine) const {
    const float gap = 1.0f + margin - cosine;
    // False for NaN, which is kept.
    const float weight = -scale * (gap < 0.0f ? 0.0f : gap);
    return {weight * (cosine - (1.0f - margin)), weight};
  }
  UF_HOST_DEVICE Logit negative(float cosine) const {
    const float gap = cosine + margin;
    const float weight = scale * (gap < 0.0f ? 0.0f : gap);
    return {weight * (cosine - margin), weight};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
