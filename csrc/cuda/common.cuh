// Shared by all kernel files: checked launches, warp and block reductions, element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <climits>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "unitsface/macros.h"
#include "unitsface/policy.h"
#include "unitsface/tile_args.h"

namespace unitsface::cuda {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kLanes * kWarps;

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // Not sticky: the next call starts clean.
  throw std::runtime_error("CUDA kernel " + what + ": " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// Launches kThreads threads per block; `name` appears in error messages.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int jobs, void* stream,
            const Arguments&... arguments) {
  if (blocks > INT_MAX) throw std::runtime_error(std::string(name) + ": tile too large");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(jobs));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

UF_HOST_DEVICE int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

UF_HOST_DEVICE int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T round_to(float x);
template <>
__device__ __forceinline__ float round_to<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half round_to<__half>(float x) {
  return __float2half_rn(x);
}

// Without this the compiler splits vector stores into single elements.
__device__ __forceinline__ void store_words(uint2* target, uint2 words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(target)),
               "r"(words.x), "r"(words.y)
               : "memory");
#else
  *target = words;
#endif
}

__device__ __forceinline__ void store_words(uint4* target, uint4 words) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  *target = words;
#endif
}

// K elements as one access, or as two of 16 bytes.
template <int K, class T>
__device__ __forceinline__ void load(const T* source, float* values) {
  T items[K];
  if constexpr (K == 1) {
    items[0] = *source;
  } else if constexpr (K * sizeof(T) == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(source);
    memcpy(static_cast<void*>(items), &words, 8);
  } else {
    static_assert(K * sizeof(T) % 16 == 0, "no access of this size");
#pragma unroll
    for (int k = 0; k < K; k += 16 / sizeof(T)) {
      const uint4 words = *reinterpret_cast<const uint4*>(source + k);
      memcpy(static_cast<void*>(items + k), &words, 16);
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = to_float(items[k]);
}

template <int K, class T>
__device__ __forceinline__ void store(T* target, const float* values) {
  T items[K];
#pragma unroll
  for (int k = 0; k < K; ++k) items[k] = round_to<T>(values[k]);
  if constexpr (K == 1) {
    *target = items[0];
  } else if constexpr (K * sizeof(T) == 8) {
    uint2 words;
    memcpy(&words, items, 8);
    store_words(reinterpret_cast<uint2*>(target), words);
  } else {
    static_assert(K * sizeof(T) % 16 == 0, "no access of this size");
#pragma unroll
    for (int k = 0; k < K; k += 16 / sizeof(T)) {
      uint4 words;
      memcpy(&words, items + k, 16);
      store_words(reinterpret_cast<uint4*>(target + k), words);
    }
  }
}

// The element type is uniform over a launch: a branch costs less than more kernel variants.
template <int K>
__device__ __forceinline__ void store(void* target, DType dtype, int64_t offset,
                                      const float* values) {
  if (dtype == DType::kFloat32) {
    store<K>(static_cast<float*>(target) + offset, values);
  } else if (dtype == DType::kBFloat16) {
    store<K>(static_cast<__nv_bfloat16*>(target) + offset, values);
  } else {
    store<K>(static_cast<__half*>(target) + offset, values);
  }
}

// Mapping of kSpan consecutive columns of a row to a warp, kItems per lane. Vector: four neighbors
// per access, for aligned rows of a multiple of four columns; otherwise one, lane by lane.
template <bool kVector, int kItems>
struct Columns {
  static constexpr int kSpan = kLanes * kItems;

  static UF_HOST_DEVICE int first(int lane) { return kVector ? 4 * lane : lane; }
  static UF_HOST_DEVICE constexpr int offset(int item) {
    return kVector ? item / 4 * 4 * kLanes + item % 4 : item * kLanes;
  }

  // `row` points to the span's first column; columns from `width` on are left as they are.
  static __device__ __forceinline__ void read(const float* row, int lane, int width,
                                              float* values) {
    constexpr int kStep = kVector ? 4 : 1;
#pragma unroll
    for (int item = 0; item < kItems; item += kStep) {
      const int column = first(lane) + offset(item);
      if (column < width) load<kStep>(row + column, values + item);
    }
  }

  static __device__ __forceinline__ void write(void* target, DType dtype, int64_t row, int lane,
                                               int width, const float* values) {
    constexpr int kStep = kVector ? 4 : 1;
#pragma unroll
    for (int item = 0; item < kItems; item += kStep) {
      const int column = first(lane) + offset(item);
      if (column < width) store<kStep>(target, dtype, row + column, values + item);
    }
  }
};

// True if Columns<true, ...> may be used for a tile.
inline bool vectorizable(const float* cosines, const void* gradient, DType gradient_dtype,
                         int64_t m, int64_t stride) {
  return m % 4 == 0 && stride % 4 == 0 && aligned(cosines, 16) &&
         aligned(gradient, 4 * size_of(gradient_dtype));
}

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// fmaxf drops NaN; callers carry it in the sums.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

// Sums four values per lane over the warp with 6 shuffles instead of 20: lane l gets the sum of
// values[l / 8].
__device__ __forceinline__ float warp_sum_4(const float* values, int lane) {
  const bool upper = lane & 16;
  float low = upper ? values[2] : values[0];
  float high = upper ? values[3] : values[1];
  low += __shfl_xor_sync(kAllLanes, upper ? values[0] : values[2], 16);
  high += __shfl_xor_sync(kAllLanes, upper ? values[1] : values[3], 16);
  const bool odd = lane & 8;
  float sum = odd ? high : low;
  sum += __shfl_xor_sync(kAllLanes, odd ? low : high, 8);
#pragma unroll
  for (int mask = 4; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
  return sum;
}

// The same sum in every thread; `shared` holds kWarps floats. Every thread of the block calls.
__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % kLanes == 0) shared[threadIdx.x / kLanes] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp];
  return sum;
}

}  // namespace unitsface::cuda
