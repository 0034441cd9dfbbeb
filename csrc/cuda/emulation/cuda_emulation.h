// Runs the kernels of csrc/cuda on the CPU, unchanged: each .cu file is compiled by the host
// compiler as C++ with this header before it (see test_kernels.cpp). A thread of a block is a
// fiber; fibers switch at barriers and shuffles. A barrier or shuffle that some thread never
// reaches aborts.
//
// It checks indices, masks, reductions and barriers. It says nothing about speed, about device
// arithmetic, or about races that a fixed order of threads does not show.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static
#define __launch_bounds__(...)

using std::min;

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;

// Threads run from the first to the last, or the other way round: a missing barrier shows in one.
inline bool descending = false;
inline int64_t launches = 0;

struct Block {
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStackBytes);
    bool done = false;
  };
  struct Warp {
    float slots[2][kLanes];
    int arrived = 0;
    int64_t generation = 0;
  };

  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  std::function<void()> body;
  int current = 0, arrived = 0;
  int64_t generation = 0, progress = 0;

  void yield() { swapcontext(&fibers[current].context, &scheduler); }

  void synchronise() {
    const int64_t mine = generation;
    if (++arrived == static_cast<int>(fibers.size())) {
      arrived = 0;
      ++generation;
      ++progress;
    }
    while (generation == mine) yield();
  }

  // Two sets of slots: no lane can be two shuffles ahead of another.
  float shuffle_xor(float value, int mask) {
    Warp& warp = warps[current / kLanes];
    const int lane = current % kLanes;
    const int64_t mine = warp.generation;
    float (&slots)[kLanes] = warp.slots[mine % 2];
    slots[lane] = value;
    if (++warp.arrived == kLanes) {
      warp.arrived = 0;
      ++warp.generation;
      ++progress;
    }
    while (warp.generation == mine) yield();
    return slots[lane ^ mask];
  }

  void run(int threads);
};

inline Block block;
inline dim3 block_index;

struct ThreadIndex {
  struct X {
    operator unsigned() const { return static_cast<unsigned>(block.current); }
  } x;
};

inline void enter_fiber() {
  block.body();
  block.fibers[block.current].done = true;
  ++block.progress;
  block.yield();
}

inline void Block::run(int threads) {
  if (static_cast<int>(fibers.size()) != threads) fibers = std::vector<Fiber>(threads);
  warps.assign((threads + kLanes - 1) / kLanes, Warp());
  arrived = 0;
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter_fiber, 0);
  }
  for (int left = threads; left > 0;) {
    const int64_t before = progress;
    left = 0;
    for (int turn = 0; turn < threads; ++turn) {
      current = descending ? threads - 1 - turn : turn;
      if (fibers[current].done) continue;
      swapcontext(&scheduler, &fibers[current].context);
      left += !fibers[current].done;
    }
    if (left > 0 && progress == before) {
      std::fprintf(stderr, "%d threads wait for threads that never come\n", left);
      std::abort();
    }
  }
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  ++launches;
  block.body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  for (unsigned y = 0; y < config->gridDim.y; ++y) {
    for (unsigned x = 0; x < config->gridDim.x; ++x) {
      block_index = dim3(x, y);
      block.run(static_cast<int>(config->blockDim.x));
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

#define cudaLaunchKernelEx emulation::launch
static const emulation::ThreadIndex threadIdx;
#define blockIdx emulation::block_index

inline void __syncthreads() { emulation::block.synchronise(); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return emulation::block.shuffle_xor(value, mask);
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
// Threads take turns at barriers only.
template <class T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target += value;
  return before;
}
