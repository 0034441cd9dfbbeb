// Generated from losses/filtered_margin_softmax.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// FilteredMarginSoftmax: logsumexp over samples and classes.
// x0 = cosine - adaptive_margin * detach(cosine)
// x1 = margin(x0, m1, m2)
// x2 = where(margin_gradient == "detached", x0 + detach(x1 - x0), x1) - m3
// is0 = interclass_filtering_threshold < cosine
// positive = scale * x2
// negative = where((interclass_filtering_threshold > 0) & is0, 0, scale * cosine)
struct FilteredMarginSoftmax {
  static constexpr int kParameters = 8;
  float one_minus_adaptive_margin;  // 1 - adaptive_margin
  float m1;
  float m2;
  float scale;
  float m3_times_scale;                  // m3 * scale
  unsigned margin_gradient_is_detached;  // margin_gradient == "detached"
  float interclass_filtering_threshold;
  unsigned k7;  // 0 < interclass_filtering_threshold

  UF_HOST_DEVICE explicit FilteredMarginSoftmax(const float* p)
      : one_minus_adaptive_margin(p[0]),
        m1(p[1]),
        m2(p[2]),
        scale(p[3]),
        m3_times_scale(p[4]),
        margin_gradient_is_detached(all_bits(p[5] != 0.0f)),
        interclass_filtering_threshold(p[6]),
        k7(all_bits(p[7] != 0.0f)) {}

  UF_HOST_DEVICE Logit positive(float cosine) const {
    const float x0 = one_minus_adaptive_margin * cosine;
    const auto part0 = cosine_margin(x0, m1, m2);
    const float value = scale * part0.value - m3_times_scale;
    const float dcosine = scale * choose(margin_gradient_is_detached, 1.0f, part0.slope);
    return {value, dcosine};
  }

  UF_HOST_DEVICE Logit negative(float cosine) const {
    const bool is0 = (k7 != 0u) & (interclass_filtering_threshold < cosine);
    return {(is0 ? 0.0f : scale * cosine), (is0 ? 0.0f : scale)};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
