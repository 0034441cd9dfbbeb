// Generated from losses/contrastive.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// Contrastive: sum over pairs of samples.
// x0 = sqrt(max(2 - 2 * cosine, 0.0001))
// x1 = where(distance == "euclidean", x0, 1 - cosine)
// x2 = max(x1 - positive_margin, 0)
// x3 = max(negative_margin - x1, 0)
// positive = 0.5 * (x2 * x2)
// negative = 0.5 * (x3 * x3)
struct Contrastive {
  static constexpr int kParameters = 3;
  static constexpr bool kRowThresholds = false;
  unsigned distance_is_euclidean;  // distance == "euclidean"
  float positive_margin;
  float negative_margin;

  UF_HOST_DEVICE explicit Contrastive(const float* p)
      : distance_is_euclidean(all_bits(p[0] != 0.0f)),
        positive_margin(p[1]),
        negative_margin(p[2]) {}

  UF_HOST_DEVICE Term evaluate(float cosine, float, bool positive) const {
    const float x0 = 2.0f - 2.0f * cosine;
    const float x1 = sqrtf(choose(all_bits(x0 < 0.0001f), 0.0001f, x0));
    const float x2 = choose(distance_is_euclidean, x1, 1.0f - cosine);
    const float x3 = x2 - positive_margin;
    const float x4 = negative_margin - x2;
    const float x5 = choose(all_bits(positive), x3, x4);
    const float x6 = (x5 < 0.0f ? 0.0f : x5);
    const float x7 = 0.5f * (1.0f / x1 * (x0 < 0.0001f ? 0.0f : -2.0f));
    const float x8 = choose(distance_is_euclidean, x7, -1.0f);
    const float value = 0.5f * (x6 * x6);
    const float dcosine = x6 * (positive ? (x3 < 0.0f ? 0.0f : x8) : (x4 < 0.0f ? 0.0f : -x8));
    return {value, dcosine, 0.0f};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
