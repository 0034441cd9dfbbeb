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

// A condition that is the same for all pairs: all bits, or none.
UF_HOST_DEVICE unsigned all_bits(bool condition) { return condition ? ~0u : 0u; }

// `condition ? yes : no` for such a condition. A compiler that does not move it out of the loop
// cannot vectorize a selection by a bool from outside.
UF_HOST_DEVICE float choose(unsigned condition, float yes, float no) {
#if defined(__CUDA_ARCH__)
  return condition != 0u ? yes : no;
#else
  return __builtin_bit_cast(float, (__builtin_bit_cast(unsigned, yes) & condition) |
                                       (__builtin_bit_cast(unsigned, no) & ~condition));
#endif
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

struct LogParts {
  float high, low;  // the high part has few digits
};

// log(x) for normal x > 0 as a sum; the logarithm of a NaN is some number.
UF_HOST_DEVICE LogParts log_parts(float x) {
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
  return {n * 0.693359375f, log_m - n * 2.12194440e-4f};
}

// log(x) for normal x > 0, to 2 ulp.
UF_HOST_DEVICE float log_normal(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  const LogParts parts = log_parts(x);
  return parts.high + parts.low;
#endif
}

// log(1 + q) for 0 <= q < 2^127, to 3 ulp: what 1 + q has lost of q is added to the logarithm.
UF_HOST_DEVICE float log1p_positive(float q) {
  const float sum = 1.0f + q;
  return log_normal(sum) + (q - (sum - 1.0f)) / sum;
}

// log(x) for x > 0; smaller than the smallest normal number, 0 included, counts as that. NaN for
// x < 0.
UF_HOST_DEVICE float log_positive(float x) {
  const float normal = x < 1.17549435e-38f ? 1.17549435e-38f : x;
  const float log = log_normal(normal);
  // The bits of a NaN have a logarithm.
  const float other = choose(all_bits(x >= 0.0f), x, NAN);
  return choose(all_bits(x >= 0.0f) & all_bits(x < INFINITY), log, other);
}

// x^t for x > 0, 0 for x <= 0; NaN stays NaN. x counts as at least 1e-30.
UF_HOST_DEVICE float pow_positive(float x, float t) {
  const float base = x < 1e-30f ? 1e-30f : x;
#if defined(__CUDA_ARCH__)
  // The usual exponents are multiplied out: a logarithm times t loses a bit or two.
  float power = exp_clamped(t * log_normal(base));
  if (t == 1.0f) power = base;
  if (t == 2.0f) power = base * base;
  if (t == 3.0f) power = base * base * base;
#else
  // t log(x) in two parts: its rounding would be an error of the exponential, relative to it.
  const LogParts log = log_parts(base);
  const float high = t * log.high, low = t * log.low;
  const float sum = high + low, rest = low - (sum - high);
  const float exponential = exp_clamped(sum);
  const float power = choose(all_bits(base == base), exponential + exponential * rest, base);
#endif
  return choose(all_bits(x <= 0.0f), 0.0f, power);
}

// tanh(x), to 2e-7 of itself.
UF_HOST_DEVICE float tanh_bounded(float x) {
  const float u = x * x;
  // x + x^3 p(x^2) below 0.625, a minimax fit of relative error; 1 - 2 / (1 + e^2|x|) above.
  float p = -6.096934926e-03f;
  p = p * u + 2.099735213e-02f;
  p = p * u - 5.385095206e-02f;
  p = p * u + 1.333277007e-01f;
  p = p * u - 3.333332895e-01f;
  const float small = x + x * u * p;
  const float e = exp_clamped(-fabsf(2.0f * x));
  const float large = divide_by_unit(1.0f - e, 1.0f + e);
  return fabsf(x) < 0.625f ? small : (x < 0.0f ? -large : large);
}

// The nearest integer of a |x| below 2^22, halves to even: roundf would be a library call.
UF_HOST_DEVICE float nearest_integer(float x) {
  const float magic = 12582912.0f;
  return (x + magic) - magic;
}

// 1 if an integer is odd, else 0.
UF_HOST_DEVICE float is_odd(float k) {
  const float rest = k - 2.0f * nearest_integer(0.5f * k);
  return rest * rest;
}

struct SinCos {
  float sine, cosine;
};

// Sine and cosine of an angle of up to some thousand turns. CUDA's sinf and cosf keep a stack frame
// for reducing huge arguments.
UF_HOST_DEVICE SinCos sin_cos(float angle) {
  // angle = k pi / 2 + r with |r| <= pi / 4; pi / 2 in three parts, so that r keeps its accuracy.
  const float k = nearest_integer(angle * 0.636619772f);
  float r = angle - k * 1.5703125f;
  r = r - k * 4.837512969970703e-04f;
  r = r - k * 7.549789954891882e-08f;
  const float u = r * r;
  float s = -1.958669990e-04f;
  s = s * u + 8.332740660e-03f;
  s = s * u - 1.666666458e-01f;
  s = r + r * u * s;
  float c = 2.454326638e-05f;
  c = c * u - 1.388826803e-03f;
  c = c * u + 4.166666414e-02f;
  c = 1.0f - 0.5f * u + u * u * c;
  const float odd = is_odd(k), half_turns = 0.5f * (k - odd);
  const float sign = 1.0f - 2.0f * is_odd(half_turns);
  return {sign * (odd != 0.0f ? c : s), sign * (odd != 0.0f ? -s : c)};
}

// sqrt(1 - c^2) of a cosine, 0 beyond [-1, 1]: without the accuracy that 1 - c^2 loses at small
// angles.
UF_HOST_DEVICE float sine_of_cosine(float c) {
  const float square = (1.0f - c) * (1.0f + c);
  return sqrtf(square < 0.0f ? 0.0f : square);
}

// Angle of a cosine clipped to [-1, 1]: sqrt(1 - |c|) times a degree-8 polynomial, to 2e-9. The
// square root carries the singularity, so small angles keep their relative accuracy.
UF_HOST_DEVICE float angle_of_cosine(float cosine) {
  const float clipped = clamp_keep_nan(cosine, -1.0f, 1.0f);
  const float c = fabsf(clipped);
  float p = 7.091754588e-04f;
  p = p * c - 4.073795650e-03f;
  p = p * c + 1.119083863e-02f;
  p = p * c - 2.086636979e-02f;
  p = p * c + 3.263689361e-02f;
  p = p * c - 5.061052637e-02f;
  p = p * c + 8.903229154e-02f;
  p = p * c - 2.146012656e-01f;
  p = p * c + 1.570796323f;
  const float angle = p * sqrtf(1.0f - c);
  return clipped < 0.0f ? 3.14159265f - angle : angle;
}

struct CosineMargin {
  float value, slope;
};

// cos(m1 theta + m2) of the angle theta of c, continued past pi as (-1)^k cos(.) - 2k, and its
// derivative by c, for which sin(theta) is at least 1e-4. m1 and m2 are the same for many c.
UF_HOST_DEVICE CosineMargin cosine_margin(float cosine, float m1, float m2) {
  const float c = clamp_keep_nan(cosine, -1.0f, 1.0f);
  const float sine = sine_of_cosine(c);
  const float angle = m1 * angle_of_cosine(c) + m2;
  // floor; next to a multiple of pi either k gives the same value and slope.
  const float k = nearest_integer(angle * 0.318309886f - 0.5f);
  const SinCos turned = sin_cos(angle);
  // An added margin alone needs the angle for k only: more accurate.
  const SinCos margin = sin_cos(m2);
  const unsigned added = all_bits(m1 == 1.0f);
  const float sign = 1.0f - 2.0f * is_odd(k);
  const float cos_sum = c * margin.cosine - sine * margin.sine;
  const float sin_sum = sine * margin.cosine + c * margin.sine;
  const float cos_turned = choose(added, cos_sum, turned.cosine);
  const float sin_turned = choose(added, sin_sum, turned.sine);
  const float slope = sign * sin_turned * m1 / (sine < 1e-4f ? 1e-4f : sine);
  const unsigned plain = added & all_bits(m2 == 0.0f);
  return {choose(plain, cosine, sign * cos_turned - 2.0f * k), choose(plain, 1.0f, slope)};
}

struct Softplus {
  float value;    // log(1 + e^z)
  float sigmoid;  // its derivative
  float slope;    // that of the sigmoid
  // The value in parts, top + log(1 + exponential): the logarithms of a sum can be that of a
  // product.
  float top;          // max(z, 0)
  float exponential;  // e^-|z|
};

// max(z, 0) + log1p(e^-|z|), and the derivatives from the same exponential.
UF_HOST_DEVICE Softplus softplus(float z) {
  const float e = exp_clamped(-fabsf(z));
  const float inverse = divide_by_unit(1.0f, 1.0f + e);
  const float top = z > 0.0f ? z : 0.0f;
  // e * inverse, the sigmoid of -|z|, has no name: with one, GCC multiplies before it selects, and
  // the sums of USS take a tenth longer.
  return {top + log1p_unit(e), z > 0.0f ? inverse : e * inverse, e * inverse * inverse, top, e};
}

}  // namespace UF_ISA
}  // namespace unitsface
