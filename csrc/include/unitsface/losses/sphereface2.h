// SphereFace2 (ICLR 2022), with an additive (C) or an angular (A) margin.
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// Target: softplus(-(r (g(c) - m) + b)). Others: softplus(r (g(c) + m) + b). Each with its weight;
// g(c) = 2 ((c + 1) / 2)^t - 1. With an angular margin m is 0 and the target's c is cos(theta + m).
struct SphereFace2 {
  static constexpr int kParameters = 7;
  float scale, t, shift, cos_margin, sin_margin, positive_weight, negative_weight;
  bool exact;

  UF_HOST_DEVICE explicit SphereFace2(const float* p)
      : scale(p[0]),
        t(p[2]),
        shift(p[5] == 0.0f ? p[1] : 0.0f),
        cos_margin(p[5] == 0.0f ? 1.0f : cosf(p[1])),
        sin_margin(p[5] == 0.0f ? 0.0f : sinf(p[1])),
        positive_weight(p[4] / p[0] * p[3]),
        negative_weight(p[4] / p[0] * (1.0f - p[3])),
        exact(p[6] != 0.0f) {}

  UF_HOST_DEVICE Term evaluate(float cosine, float threshold, bool positive) const {
    const float c = clamp_keep_nan(cosine, -1.0f, 1.0f);
    // 1 - c^2 would lose accuracy at small angles, (1 - c)(1 + c) does not.
    const float sine = sqrtf((1.0f - c) * (1.0f + c));
    const float floor = sine < 1e-4f ? 1e-4f : sine;
    const bool past = c < -cos_margin;  // theta + m > pi
    const float moved = past ? -1.0f : c * cos_margin - sine * sin_margin;
    const float turn = past ? 0.0f : cos_margin + c * sin_margin / floor;
    const float base = 0.5f + 0.5f * (positive ? moved : c);
    // Above 0, so that half^t / half is finite.
    const float half = clamp_keep_nan(base, 1e-30f, 1.0f);
    const float power = pow_unit(half, t);
    const float slope = exact ? t * power / half * (positive ? turn : 1.0f) : 1.0f;
    // With a small t, 1e-30^t is not near 0.
    const float adjusted = 2.0f * (base <= 0.0f ? 0.0f : power) - 1.0f;
    const float logit = scale * (adjusted + (positive ? -shift : shift)) + threshold;
    const Softplus loss = softplus(positive ? -logit : logit);
    const float weight = positive ? positive_weight : negative_weight;
    const float d = positive ? -weight * loss.sigmoid : weight * loss.sigmoid;
    return {weight * loss.value, scale * slope * d, d};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
