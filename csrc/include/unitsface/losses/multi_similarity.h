// Multi-Similarity (Wang et al., CVPR 2019), without its mining of pairs.
#pragma once

#include "../policy.h"

namespace unitsface {
inline namespace UF_ISA {

// Positive: -alpha (c - base). Negative: beta (c - base).
struct MultiSimilarity {
  static constexpr int kParameters = 3;
  static constexpr bool kPositives = true;
  float alpha, beta, base;

  UF_HOST_DEVICE explicit MultiSimilarity(const float* p) : alpha(p[0]), beta(p[1]), base(p[2]) {}

  UF_HOST_DEVICE Logit positive(float cosine) const { return {-alpha * (cosine - base), -alpha}; }
  UF_HOST_DEVICE Logit negative(float cosine) const { return {beta * (cosine - base), beta}; }
};

}  // namespace UF_ISA
}  // namespace unitsface
