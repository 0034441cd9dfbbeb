// Instructions of sm_80 and later. Each names its section of the PTX ISA, below "Instructions":
// their numbers change between versions.
#pragma once

#if defined(UF_EMULATED)
#include "../emulation/ptx_sm80.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace unitsface::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Accesses to shared memory that several threads use: plain ones, which the emulation checks.
template <class T>
__device__ __forceinline__ T shared_load(const T* source) {
  return *source;
}
template <class T>
__device__ __forceinline__ void shared_store(T* target, T value) {
  *target = value;
}
// What is read from memory afterwards is read again, not kept in registers from before.
__device__ __forceinline__ void forget_loads() { asm volatile("" ::: "memory"); }
// The same number; what depends on it is computed again, not kept in registers from before.
__device__ __forceinline__ int64_t computed_again(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}
__device__ __forceinline__ float computed_again(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
__device__ __forceinline__ unsigned computed_again(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}
// The kernel's shared memory.
__device__ __forceinline__ void declare_shared(void*, int) {}

// Asynchronous Copy Instructions, cp.async: 16 bytes. A size known when the kernel runs only, which
// fills with zeros, would take seven instructions more.
__device__ __forceinline__ void copy_async(void* target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)),
               "l"(__cvta_generic_to_global(source))
               : "memory");
}

// Asynchronous Copy Instructions, cp.async.commit_group: what was copied since the last one is a
// group.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Asynchronous Copy Instructions, cp.async.wait_group: all groups of this thread but the last
// kPending are there. Other threads need a barrier after it.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Warp-level Matrix Load Instruction, ldmatrix: four matrices of 8 rows of 16 bytes; lane l names
// row l % 8 of matrix l / 8, and gets word l % 4 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// Matrix Fragments for mma.m16n8k16 with floating point type: c += a b of bfloat16, of float16.
__device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Matrix Fragments for mma.m16n8k8, of TF32.
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Data Movement and Conversion Instructions, cvt.rna.tf32.f32: to the nearest, of two equally near
// ones away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// Floating Point Instructions, ex2.approx.ftz.f32: 2^x to 2 ulp, 0 below the normal numbers.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace unitsface::cuda
#endif
