// Generated from losses/proxy_nca.py by python -m unitsface_kernels.policy generate
#pragma once

#include <math.h>

#include "../policy.h"
#include "../scalar_math.h"

namespace unitsface {
inline namespace UF_ISA {

// ProxyNCA: logsumexps over samples and classes.
// x0 = 2 * scale * cosine
// x1 = where(negatives < -1e+29, 0, negatives - positives)
// positive = x0
// negative = x0
// finish = where(denominator == "all", softplus(x1), x1)
struct ProxyNCA {
  static constexpr int kParameters = 1;
  float k0;  // 2 * scale

  UF_HOST_DEVICE explicit ProxyNCA(const float* p) : k0(p[0]) {}

  UF_HOST_DEVICE Logit positive(float cosine) const { return {k0 * cosine, k0}; }

  UF_HOST_DEVICE Logit negative(float cosine) const { return {k0 * cosine, k0}; }
};

}  // namespace UF_ISA
}  // namespace unitsface
