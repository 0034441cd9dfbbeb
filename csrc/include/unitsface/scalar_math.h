// Scalar functions that vectorize on the CPU (no branches, no library calls) and run on CUDA.
#pragma once

#include <math.h>

#include "macros.h"

namespace unitsface {
inline namespace UF_ISA {

// A comparison with NaN is false, so that `x < low ? low : x` keeps NaN where fmax would drop it.
UF_HOST_DEVICE float clamp_keep_nan(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// e^x to 2 ulp; arguments are clamped to [-87, 88], where the result neither under- nor overflows.
// NaN stays NaN, whatever its sign and payload.
UF_HOST_DEVICE float exp_clamped(float x) {
  x = clamp_keep_nan(x, -87.0f, 88.0f);
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // x = n ln2 + r, |r| <= ln2 / 2. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low
  // bits of the mantissa; 127 more make it the exponent field of 2^n.
  const float magic = 12582912.0f + 127.0f;
  const float shifted = x * 1.44269504089f + magic;
  const float n = shifted - magic;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // Taylor coefficients suffice: |r|^8 / 8! < 6e-9.
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // A multiplication preserves NaN; adding the exponent to the bits of a NaN might not.
  return p * __builtin_bit_cast(float, __builtin_bit_cast(unsigned, shifted) << 23);
#endif
}

// x / y for y >= 1, 0 on the GPU where 1 / y is denormal. Its exact division has a branch for the
// extremes of y, across which the compiler cannot interleave elements; this one errs by 2 ulp at
// most.
UF_HOST_DEVICE float divide_by_unit(float x, float y) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  return x * inverse;
#else
  return x / y;
#endif
}

// log(1 + e) for 0 <= e <= 1, relative error below 2e-7 (CUDA: 4e-7) down to e = 0. Half as many
// instructions as CUDA's log1pf, and no branch.
UF_HOST_DEVICE float log1p_unit(float e) {
  // 2 atanh(t) with t = e / (2 + e) <= 1/3; the first term left out is t^17 / 17.
  const float t = divide_by_unit(e, 2.0f + e);
  const float u = t * t;
  float p = 1.0f / 15.0f;
  p = p * u + 1.0f / 13.0f;
  p = p * u + 1.0f / 11.0f;
  p = p * u + 1.0f / 9.0f;
  p = p * u + 1.0f / 7.0f;
  p = p * u + 1.0f / 5.0f;
  p = p * u + 1.0f / 3.0f;
  return 2.0f * t + 2.0f * t * u * p;
}

// log(x) for normal x > 0, to 2 ulp.
UF_HOST_DEVICE float log_normal(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)); log(m) = 2 atanh(t), t = (m - 1) / (m + 1).
  const unsigned bits = __builtin_bit_cast(unsigned, x);
  const unsigned offset = bits - 0x3f3504f3u;
  const float n = static_cast<float>(static_cast<int>(offset) >> 23);
  const float m = __builtin_bit_cast(float, (offset & 0x007fffffu) + 0x3f3504f3u);
  const float t = (m - 1.0f) / (m + 1.0f);
  const float u = t * t;
  // |t| <= 0.172; the first term left out is t^13 / 13.
  float p = 1.0f / 11.0f;
  p = p * u + 1.0f / 9.0f;
  p = p * u + 1.0f / 7.0f;
  p = p * u + 1.0f / 5.0f;
  p = p * u + 1.0f / 3.0f;
  const float log_m = 2.0f * t + 2.0f * t * u * p;
  return n * 0.693359375f + (log_m - n * 2.12194440e-4f);
#endif
}

// x^t for 1e-30 <= x <= 1 and t > 0; NaN stays NaN. The usual exponents are multiplied out: a
// logarithm times t loses a bit or two.
UF_HOST_DEVICE float pow_unit(float x, float t) {
  if (t == 1.0f) return x;
  if (t == 2.0f) return x * x;
  if (t == 3.0f) return x * x * x;
  const float power = exp_clamped(t * log_normal(x));
  return x == x ? power : x;
}

// cos(pi x) and sin(pi x). CUDA's cos and sin keep a stack frame for reducing huge arguments.
UF_HOST_DEVICE double cos_half_turns(double x) {
#if defined(__CUDA_ARCH__)
  return cospi(x);
#else
  return cos(3.14159265358979323846 * x);
#endif
}

UF_HOST_DEVICE double sin_half_turns(double x) {
#if defined(__CUDA_ARCH__)
  return sinpi(x);
#else
  return sin(3.14159265358979323846 * x);
#endif
}

struct Softplus {
  float value;    // log(1 + e^z)
  float sigmoid;  // its derivative
};

// max(z, 0) + log1p(e^-|z|), and the sigmoid from the same exponential.
UF_HOST_DEVICE Softplus softplus(float z) {
  const float e = exp_clamped(-fabsf(z));
  const float inverse = divide_by_unit(1.0f, 1.0f + e);
  return {(z > 0.0f ? z : 0.0f) + log1p_unit(e), z > 0.0f ? inverse : e * inverse};
}

}  // namespace UF_ISA
}  // namespace unitsface
