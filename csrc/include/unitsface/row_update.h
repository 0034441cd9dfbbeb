// An optimizer step on some rows of a matrix; the same for CPU and CUDA. Each rule is that of
// Torch, with the same order of operations.
#pragma once

#include <math.h>

#include <cstdint>

#include "unitsface/macros.h"

namespace unitsface {

enum class RowRule : int { kSgd = 0, kAdamW = 1 };

struct UpdateRowsArgs {
  float* weight;          // [rows, d]
  const float* gradient;  // [n, d]
  const int64_t* index;   // [n] rows of weight, each once, or null: rows start ... start + n - 1
  int64_t start, n, d;
  const float* gradient_scale;  // [1] or null
  RowRule rule;
  float step_size;  // AdamW: with the correction of the first moment's bias
  // SGD. first: the momentum buffer, [rows, d] like weight; null: no momentum.
  float weight_decay, momentum;
  bool nesterov;
  // AdamW. first and second: the moments.
  float kept;             // 1 - learning rate * weight decay
  float one_minus_beta1;  // from double: at 0.999 a difference in float has lost 5 digits
  float beta2, one_minus_beta2;
  float second_correction;  // root of the correction of the second moment's bias
  float eps;
  float *first, *second;
  int64_t rows;  // of weight
};

inline namespace UF_ISA {

// A rule changes one weight and its kStates state values. Compilers choose which multiplications to
// fuse with additions: only the same kernel gives equal bits.
struct Sgd {
  static constexpr int kStates = 0;
  float step_size, weight_decay;

  UF_HOST_DEVICE explicit Sgd(const UpdateRowsArgs& t)
      : step_size(t.step_size), weight_decay(t.weight_decay) {}

  UF_HOST_DEVICE void operator()(float& w, float g) const {
    g = g + weight_decay * w;
    w = w - step_size * g;
  }
};

struct MomentumSgd {
  static constexpr int kStates = 1;
  float step_size, weight_decay, momentum;
  bool nesterov;

  UF_HOST_DEVICE explicit MomentumSgd(const UpdateRowsArgs& t)
      : step_size(t.step_size),
        weight_decay(t.weight_decay),
        momentum(t.momentum),
        nesterov(t.nesterov) {}

  UF_HOST_DEVICE void operator()(float& w, float g, float& buffer) const {
    g = g + weight_decay * w;
    buffer = momentum * buffer + g;
    const float ahead = g + momentum * buffer;
    w = w - step_size * (nesterov ? ahead : buffer);
  }
};

struct AdamW {
  static constexpr int kStates = 2;
  float step_size, kept, one_minus_beta1, beta2, one_minus_beta2, second_correction, eps;

  UF_HOST_DEVICE explicit AdamW(const UpdateRowsArgs& t)
      : step_size(t.step_size),
        kept(t.kept),
        one_minus_beta1(t.one_minus_beta1),
        beta2(t.beta2),
        one_minus_beta2(t.one_minus_beta2),
        second_correction(t.second_correction),
        eps(t.eps) {}

  UF_HOST_DEVICE void operator()(float& w, float g, float& mean, float& square) const {
    mean = mean + one_minus_beta1 * (g - mean);
    square = beta2 * square + one_minus_beta2 * (g * g);
    const float root = sqrtf(square) / second_correction + eps;
    w = w * kept - step_size * (mean / root);
  }
};

}  // namespace UF_ISA
}  // namespace unitsface
