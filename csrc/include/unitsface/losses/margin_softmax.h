// Margin softmax: NormFace, CosFace, ArcFace, SphereFace-R.
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// Target: s (cos(m1 theta + m2) - m3), continued past pi as (-1)^k cos(.) - 2k, where theta is the
// angle of c - a c; the second c is a constant, as is the whole margin if detached. Others: s c.
struct MarginSoftmax {
  static constexpr int kParameters = 6;
  float scale, m1, m2, m3;
  bool detached;
  float adaptive;

  UF_HOST_DEVICE explicit MarginSoftmax(const float* p)
      : scale(p[0]), m1(p[1]), m2(p[2]), m3(p[3]), detached(p[4] != 0.0f), adaptive(p[5]) {}

  UF_HOST_DEVICE Logit positive(float cosine) const {
    const float shrunk = cosine - adaptive * cosine;
    if (m1 == 1.0f && m2 == 0.0f) return {scale * (shrunk - m3), scale};
    // Called once per row: the cost of double precision is negligible.
    const double c = clamp_keep_nan(shrunk, -1.0f, 1.0f);
    // After k half turns, (-1)^k cos and (-1)^k sin of the angle are those of the remainder.
    const double half_turns = (m1 * acos(c) + m2) / 3.14159265358979323846;
    const double k = floor(half_turns);
    const double target = cos_half_turns(half_turns - k) - 2.0 * k;
    // d theta / d c is infinite at c = +-1; sin(theta) >= 1e-4 keeps it finite.
    const double sin_squared = 1.0 - c * c;
    const double sin_theta = sqrt(sin_squared > 1e-8 ? sin_squared : 1e-8);
    const double slope = detached ? 1.0 : sin_half_turns(half_turns - k) * m1 / sin_theta;
    return {static_cast<float>(scale * (target - m3)), static_cast<float>(scale * slope)};
  }

  UF_HOST_DEVICE Logit negative(float cosine) const { return {scale * cosine, scale}; }
};

}  // namespace UF_ISA
}  // namespace unitsface
