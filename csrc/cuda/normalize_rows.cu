// Rows divided by their norms, and the Jacobian of that. A warp takes a row and keeps the first 16
// elements per lane in registers: rows of up to 512 elements are read once.

#include <cfloat>

#include "common.cuh"
#include "kernels.h"

namespace unitsface::cuda {

constexpr int kHeld = 16;  // elements per lane and chunk

// A chunk of a row: kHeld elements per lane, kGroup neighbors per access.
template <int kGroup>
struct Chunk {
  static constexpr int kGroups = kHeld / kGroup;
  static constexpr int64_t kSpan = kHeld * kLanes;

  static UF_HOST_DEVICE int64_t first(int64_t chunk, int group, int lane) {
    return chunk * kSpan + (group * kLanes + lane) * kGroup;
  }

  template <class T>
  static __device__ __forceinline__ void read(const T* row, int64_t chunk, int64_t d, int lane,
                                              float* values) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t k = first(chunk, group, lane);
      if (k < d) {
        load<kGroup>(row + k, values + group * kGroup);
      } else {
#pragma unroll
        for (int e = 0; e < kGroup; ++e) values[group * kGroup + e] = 0.0f;
      }
    }
  }

  static __device__ __forceinline__ void write(void* target, DType dtype, int64_t row,
                                               int64_t chunk, int64_t d, int lane,
                                               const float* values) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t k = first(chunk, group, lane);
      if (k < d) store<kGroup>(target, dtype, row + k, values + group * kGroup);
    }
  }
};

// 1 / norm of a row whose squares overflow or are NaN; NaN if an element is not finite.
template <class Source>
__device__ float inverse_of_extreme(const Source* source, int64_t d, int lane) {
  float squares = 0.0f;
  for (int64_t k = lane; k < d; k += kLanes) {
    const float x = to_float(source[k]) * kShrink;
    squares += x * x;
  }
  squares = warp_sum(squares);
  // A difference of infinities or NaN is NaN.
  const float inverse = kShrink / sqrtf(squares) + (squares - squares);
  return inverse < FLT_MIN ? FLT_MIN : inverse;
}

// kGroup: elements per access, of 16 bytes of the source, or 1 for unaligned rows.
template <class Source, int kGroup>
__global__ void __launch_bounds__(kThreads, 2) normalize_rows_kernel(const NormalizeRowsArgs args) {
  const int lane = threadIdx.x % kLanes;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (i >= args.n) return;
  const int64_t from = args.index != nullptr ? args.index[i] : args.start + i;
  const Source* source = static_cast<const Source*>(args.source) + from * args.d;
  const int64_t chunks = divide_up(args.d, Chunk<kGroup>::kSpan);
  float values[kHeld] = {};
  float squares = 0.0f;
  // Backwards, so that the registers hold the first chunk when the unit row is written.
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    Chunk<kGroup>::read(source, chunk, args.d, lane, values);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) squares += values[k] * values[k];
  }
  squares = warp_sum(squares);
  const float norm = sqrtf(squares);
  // A comparison, not fmaxf, which would replace NaN.
  float inverse = 1.0f / (norm < kNormEps ? kNormEps : norm);
  // The same for the whole warp.
  if (!(squares <= FLT_MAX)) inverse = inverse_of_extreme(source, args.d, lane);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (chunk > 0) Chunk<kGroup>::read(source, chunk, args.d, lane, values);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) values[k] *= inverse;
    Chunk<kGroup>::write(args.unit, args.unit_dtype, i * args.d, chunk, args.d, lane, values);
  }
  if (lane == 0) args.inverse_norms[i] = inverse;
}

// In place, a lane writes only elements that it has read, after the row's dot product is complete.
template <class Source, int kGroup>
__global__ void __launch_bounds__(kThreads, 2)
    normalize_rows_backward_kernel(const NormalizeRowsBackwardArgs args) {
  const int lane = threadIdx.x % kLanes;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (i >= args.n) return;
  const int64_t from = args.index != nullptr ? args.index[i] : args.start + i;
  const Source* source = static_cast<const Source*>(args.source) + from * args.d;
  const float* d_unit = args.d_unit + i * args.d;
  const float inverse = args.inverse_norms[i];
  const float factor = args.scale != nullptr ? inverse * args.scale[0] : inverse;
  // A clamped norm is constant.
  const bool clamped = inverse >= 1.0f / kNormEps;
  const int64_t chunks = divide_up(args.d, Chunk<kGroup>::kSpan);
  float gradients[kHeld] = {}, values[kHeld] = {};
  float dot = 0.0f;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    Chunk<kGroup>::read(d_unit, chunk, args.d, lane, gradients);
    Chunk<kGroup>::read(source, chunk, args.d, lane, values);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) dot += gradients[k] * (values[k] * inverse);
  }
  dot = warp_sum(dot);
  const float projection = clamped ? 0.0f : dot;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (chunk > 0) {
      Chunk<kGroup>::read(d_unit, chunk, args.d, lane, gradients);
      Chunk<kGroup>::read(source, chunk, args.d, lane, values);
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      gradients[k] = factor * (gradients[k] - projection * (values[k] * inverse));
    }
    Chunk<kGroup>::write(args.out, args.out_dtype, i * args.d, chunk, args.d, lane, gradients);
  }
}

template <class Source>
void launch_normalize_rows(const NormalizeRowsArgs& args, void* stream) {
  constexpr int kGroup = 16 / sizeof(Source);
  const bool vector = args.d % kGroup == 0 && aligned(args.source, 16) && aligned(args.unit, 16);
  launch("normalize_rows",
         vector ? normalize_rows_kernel<Source, kGroup> : normalize_rows_kernel<Source, 1>,
         divide_up(args.n, kWarps), 1, stream, args);
}

template <class Source>
void launch_normalize_rows_backward(const NormalizeRowsBackwardArgs& args, void* stream) {
  constexpr int kGroup = 16 / sizeof(Source);
  const bool vector = args.d % kGroup == 0 && aligned(args.source, 16) &&
                      aligned(args.d_unit, 16) && aligned(args.out, 16);
  launch("normalize_rows_backward",
         vector ? normalize_rows_backward_kernel<Source, kGroup>
                : normalize_rows_backward_kernel<Source, 1>,
         divide_up(args.n, kWarps), 1, stream, args);
}

void normalize_rows(const NormalizeRowsArgs& args, void* stream) {
  if (args.n == 0) return;
  switch (args.source_dtype) {
    case DType::kFloat32:
      return launch_normalize_rows<float>(args, stream);
    case DType::kBFloat16:
      return launch_normalize_rows<__nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return launch_normalize_rows<__half>(args, stream);
  }
}

void normalize_rows_backward(const NormalizeRowsBackwardArgs& args, void* stream) {
  if (args.n == 0 || args.d == 0) return;
  switch (args.source_dtype) {
    case DType::kFloat32:
      return launch_normalize_rows_backward<float>(args, stream);
    case DType::kBFloat16:
      return launch_normalize_rows_backward<__nv_bfloat16>(args, stream);
    case DType::kFloat16:
      return launch_normalize_rows_backward<__half>(args, stream);
  }
}

}  // namespace unitsface::cuda
