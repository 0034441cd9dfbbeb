// Generated from losses/proxy_anchor.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// ProxyAnchor: logsumexps over pairs of samples.
// positive = -(alpha * (cosine - margin))
// negative = alpha * (cosine + margin)
// finish = softplus(positives) / share_with_positives + softplus(negatives)
struct ProxyAnchor {
  static constexpr int kParameters = 4;
  static constexpr bool kPositives = true;
  float alpha;
  float margin_times_alpha;  // margin * alpha
  float alpha_times_margin;  // alpha * margin
  float minus_alpha;         // -alpha

  UF_HOST_DEVICE explicit ProxyAnchor(const float* p)
      : alpha(p[0]), margin_times_alpha(p[1]), alpha_times_margin(p[2]), minus_alpha(p[3]) {}

  UF_HOST_DEVICE Logit positive(float cosine) const {
    return {margin_times_alpha - alpha * cosine, minus_alpha};
  }

  UF_HOST_DEVICE Logit negative(float cosine) const {
    return {alpha * cosine + alpha_times_margin, alpha};
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
