// Top-k search for each row's nearest wrong columns; independent of the loss.
//
// A warp takes a row: 1024 columns at a time in registers, and the running top-k sorted over
// its lanes, slot by slot. After a few tiles hardly any column enters the top-k.

#include "common.cuh"
#include "kernels.h"

namespace unitsface::cuda {

constexpr int kItems = 32;  // columns per lane
constexpr int kSpan = kItems * kLanes;
constexpr int kSlots = static_cast<int>(kMostNearest) / kLanes;  // top-k columns per lane

// Maps cosines to unsigned integers in the order of the search: NaN is the largest, -0 equals 0.
UF_HOST_DEVICE unsigned key_of(float cosine) {
  cosine += 0.0f;
  unsigned bits;
  memcpy(&bits, &cosine, 4);
  const unsigned key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return cosine != cosine ? UINT_MAX : key;
}

UF_HOST_DEVICE float cosine_of(unsigned key) {
  const unsigned bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float cosine;
  memcpy(&cosine, &bits, 4);
  return cosine;
}

constexpr unsigned kNoKey = 0;  // below that of every cosine, -inf included

__device__ __forceinline__ unsigned warp_largest(unsigned x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

__device__ __forceinline__ int warp_smallest(int x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = min(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

// The top-k columns of a row, in the order of the search; slot s is in lane s % 32.
struct Found {
  unsigned keys[kSlots];
  int positions[kSlots];

  __device__ __forceinline__ void read(const NearestTileArgs& args, int64_t row, int lane) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int slot = s * kLanes + lane;
      const bool used = slot < args.k;
      keys[s] = used ? key_of(args.best[row * args.k + slot]) : kNoKey;
      positions[s] = used ? args.position[row * args.k + slot] : -1;
    }
  }

  __device__ __forceinline__ void write(const NearestTileArgs& args, int64_t row, int lane) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int slot = s * kLanes + lane;
      if (slot < args.k) {
        args.best[row * args.k + slot] = cosine_of(keys[s]);
        args.position[row * args.k + slot] = positions[s];
      }
    }
  }

  // A column with a larger key enters the top-k.
  __device__ __forceinline__ unsigned last(int64_t k) const {
    const int slot = static_cast<int>(k) - 1;
    unsigned key = keys[0];
#pragma unroll
    for (int s = 1; s < kSlots; ++s) key = slot / kLanes == s ? keys[s] : key;
    return __shfl_sync(kAllLanes, key, slot % kLanes);
  }

  // Behind equal ones, which have smaller positions. Slots behind k are never read.
  __device__ __forceinline__ void insert(unsigned key, int position, int lane) {
    int rank = 0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) rank += __popc(__ballot_sync(kAllLanes, keys[s] >= key));
#pragma unroll
    for (int s = kSlots - 1; s >= 0; --s) {
      unsigned key_before = __shfl_up_sync(kAllLanes, keys[s], 1);
      int position_before = __shfl_up_sync(kAllLanes, positions[s], 1);
      if (s > 0) {
        const unsigned key_below = __shfl_sync(kAllLanes, keys[s - 1], kLanes - 1);
        const int position_below = __shfl_sync(kAllLanes, positions[s - 1], kLanes - 1);
        key_before = lane == 0 ? key_below : key_before;
        position_before = lane == 0 ? position_below : position_before;
      }
      const int slot = s * kLanes + lane;
      keys[s] = slot < rank ? keys[s] : slot == rank ? key : key_before;
      positions[s] = slot < rank ? positions[s] : slot == rank ? position : position_before;
    }
  }
};

template <bool kVector>
__global__ void __launch_bounds__(kThreads, 2) nearest_tile_kernel(const NearestTileArgs args) {
  using Lane = Columns<kVector, kItems>;
  const int lane = threadIdx.x % kLanes;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (i >= args.n) return;
  const float* row = args.cosines + i * args.stride;
  const int64_t target = args.targets[i] < 0 ? -1 : args.targets[i] - args.start;
  Found found;
  found.read(args, i, lane);
  unsigned last = found.last(args.k);
  bool changed = false;
  for (int64_t first = 0; first < args.m; first += kSpan) {
    const int width = static_cast<int>(min(args.m - first, static_cast<int64_t>(kSpan)));
    const bool has_target = target >= first && target < first + width;
    float values[kItems] = {};
    Lane::read(row + first, lane, width, values);
    // Relative to the lane's first column; below 0: none.
    const int own = has_target ? static_cast<int>(target - first) - Lane::first(lane) : -1;
    const int inside = width - Lane::first(lane);
    unsigned keys[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const bool candidate = Lane::offset(k) < inside && Lane::offset(k) != own;
      keys[k] = candidate ? key_of(values[k]) : kNoKey;
    }
    while (true) {
      unsigned top = kNoKey;
#pragma unroll
      for (int k = 0; k < kItems; ++k) top = max(top, keys[k]);
      top = warp_largest(top);
      if (top <= last) break;
      int place = INT_MAX;
#pragma unroll
      for (int k = kItems - 1; k >= 0; --k) {
        if (keys[k] == top) place = Lane::first(lane) + Lane::offset(k);
      }
      place = warp_smallest(place);
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (Lane::first(lane) + Lane::offset(k) == place) keys[k] = kNoKey;
      }
      found.insert(top, static_cast<int>(args.start + first) + place, lane);
      last = found.last(args.k);
      changed = true;
    }
  }
  if (changed) found.write(args, i, lane);
  if (lane == 0 && target >= 0 && target < args.m) args.target_cosine[i] = row[target];
}

void nearest_tile(const NearestTileArgs& args, void* stream) {
  if (args.n == 0 || args.m == 0) return;
  const bool vector = vectorizable(args.cosines, nullptr, DType::kFloat32, args.m, args.stride);
  launch("nearest_tile", vector ? nearest_tile_kernel<true> : nearest_tile_kernel<false>,
         divide_up(args.n, kWarps), 1, stream, args);
}

}  // namespace unitsface::cuda
