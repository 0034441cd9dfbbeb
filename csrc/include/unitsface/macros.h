// Macros with which one policy header serves CPU and CUDA code.
#pragma once

#if defined(__CUDACC__)
#define UF_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER) && !defined(__clang__)
#define UF_HOST_DEVICE __forceinline
#else
#define UF_HOST_DEVICE inline __attribute__((always_inline))
#endif

// The same after the parameters of a lambda; and a function that is never inlined.
#if defined(_MSC_VER) && !defined(__clang__)
#define UF_INLINED
#define UF_SHARED __declspec(noinline)
#else
#define UF_INLINED __attribute__((always_inline))
#define UF_SHARED __attribute__((noinline))
#endif

// The CPU kernels are compiled once per instruction set. Everything inline lives in a namespace of
// that set's name, so that the linker cannot replace a baseline function by an AVX-512 one.
#if !defined(UF_ISA)
#define UF_ISA baseline
#endif
