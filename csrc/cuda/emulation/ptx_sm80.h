// The functions of csrc/cuda/fused/ptx_sm80.cuh in the emulation.
#pragma once

#include "async_copies.h"
#include "cuda/fused/mutations.h"
#include "mma.h"

namespace unitsface::cuda {

template <class T>
T shared_load(const T* source) {
  emulation::shared_memory.read(source, sizeof(T));
  return *source;
}
template <class T>
void shared_store(T* target, T value) {
  emulation::shared_memory.write(target, sizeof(T));
  *target = value;
}
inline void forget_loads() {}
template <class T>
T computed_again(T x) {
  return x;
}
inline void declare_shared(void* memory, int bytes) {
  emulation::shared_memory.declare(memory, bytes);
}

inline void copy_async(void* target, const void* source) {
  if ((reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source)) % 16 != 0) {
    emulation::broken("addresses of cp.async are aligned to 16 bytes");
  }
  emulation::own_copies().start(target, source, 16);
}
inline void commit_copies() { emulation::own_copies().commit(); }
template <int kPending>
void wait_for_copies() {
  emulation::own_copies().wait(kPending);
}

using emulation::load_matrices;

inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static const char kName[] = "mma.m16n8k16.bf16";
  emulation::multiply_fragments<2>(kName, c, a, b0, b1, emulation::bfloat16_of);
}
inline void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static const char kName[] = "mma.m16n8k16.f16";
  emulation::multiply_fragments<2>(kName, c, a, b0, b1, emulation::float16_of);
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static const char kName[] = "mma.m16n8k8.tf32";
  emulation::multiply_fragments<1>(kName, c, a, b0, b1, emulation::tf32_of);
}

// To the nearest, halves away from zero; what is not finite stays.
inline uint32_t round_to_tf32(uint32_t bits) {
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

inline float exp2_approximate(float x) {
  const float result = exp2f(x);
  return result < 1.17549435e-38f ? 0.0f : result;
}

}  // namespace unitsface::cuda
