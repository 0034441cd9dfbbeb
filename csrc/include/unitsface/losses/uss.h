// USS (UniTSFace, Li et al., NeurIPS 2023, eq. 11; eq. 24 with a margin), and pair BCE (eq. 22),
// where the threshold is that of the column's identity.
#pragma once

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// Positive: softplus(-(s (c - m) - b)). Negative: softplus(s c - b).
struct Uss {
  static constexpr int kParameters = 2;
  float scale, margin;

  UF_HOST_DEVICE explicit Uss(const float* p) : scale(p[0]), margin(p[1]) {}

  UF_HOST_DEVICE Term evaluate(float cosine, float threshold, bool positive) const {
    const float z = positive ? threshold - scale * (cosine - margin) : scale * cosine - threshold;
    const Softplus t = softplus(z);
    const float d = positive ? -t.sigmoid : t.sigmoid;
    return {t.value, scale * d, -d};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
