// UCE (UniFace, Zhou et al., ICCV 2023), and class BCE, where every class has its own threshold.
#pragma once

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// Target: softplus(-(s (c - m - a c) - b)), the last c a constant. Others: negative_weight times
// softplus(s c - b).
struct Uce {
  static constexpr int kParameters = 4;
  float scale, margin, negative_weight, adaptive;

  UF_HOST_DEVICE explicit Uce(const float* p)
      : scale(p[0]), margin(p[1]), negative_weight(p[2]), adaptive(p[3]) {}

  UF_HOST_DEVICE Term evaluate(float cosine, float threshold, bool positive) const {
    const float shifted = cosine - (margin + adaptive * cosine);
    const float z = positive ? threshold - scale * shifted : scale * cosine - threshold;
    const Softplus t = softplus(z);
    const float d = positive ? -t.sigmoid : negative_weight * t.sigmoid;
    return {positive ? t.value : negative_weight * t.value, scale * d, -d};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
