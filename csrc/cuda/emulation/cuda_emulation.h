// Runs the kernels of csrc/cuda on the CPU, unchanged: each .cu file is compiled by the host
// compiler as C++ with this header before it (see checks.h). A thread of a block is a
// fiber; fibers switch at barriers and shuffles. A barrier or shuffle that some thread never
// reaches aborts. The blocks of a cluster run together.
//
// It checks indices, masks, reductions and barriers. It does not show speed, device arithmetic, or
// races that need another order of threads. Asynchronous copies, their barriers and the tensor
// cores of Hopper are in machine.h.
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
#include <utility>
#include <vector>

// Kernels are compiled for the emulation.
#define UF_EMULATED 1

#undef __shared__
#undef __launch_bounds__
#define __shared__ static
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

using std::max;
using std::min;

namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;

// Threads run first to last or last to first: one of the two orders exposes a missing barrier.
inline bool descending = false;
// Every launch in one of the two orders, as if by chance.
inline bool mixed = false;
inline int64_t launches = 0, dynamic_launches = 0;  // of these, with dynamic shared memory

// Ends the process where a rule of the PTX ISA or of CUDA C++ is broken.
[[noreturn]] inline void broken(const char* rule) {
  std::fflush(stdout);
  std::fprintf(stderr, "rule: %s\n", rule);
  std::abort();
}

// What asynchronous instructions leave to be done at the start and at the end of a cluster, most
// often one block, and at the end of a thread.
inline std::vector<void (*)()> block_starts, block_ends, thread_ends;
// What may happen when no thread can go on; true if something did.
inline std::vector<bool (*)()> block_idles;
// Whether a block of a cluster stands still while the others run on for a while.
inline bool (*block_pauses)() = nullptr;

// A cluster of blocks. Threads are counted through all of them.
struct Block {
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStackBytes);
    bool done = false;
    const std::function<bool()>* ready = nullptr;  // what the thread waits for, if it said so
    const char* waits_for = "a barrier or shuffle";
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
  int threads = 0, cluster = 1;  // threads of each block, blocks
  int current = 0, arrived = 0;
  int64_t generation = 0, progress = 0;
  size_t dynamic_bytes = 0;  // of shared memory

  void yield() { swapcontext(&fibers[current].context, &scheduler); }

  // Until `ready`, which some other thread or copy makes true.
  void wait(const char* what, const std::function<bool()>& ready) {
    if (ready()) return;
    Fiber& fiber = fibers[current];
    const char* before = std::exchange(fiber.waits_for, what);
    fiber.ready = &ready;
    do {
      yield();
    } while (!ready());
    fiber.ready = nullptr;
    fiber.waits_for = before;
    ++progress;
  }

  // Of the cluster, the block of the current thread.
  int rank() const { return current / threads; }

  void synchronize() {
    if (cluster > 1) broken("the emulation has no __syncthreads in clusters");
    const int64_t mine = generation;
    if (++arrived == static_cast<int>(fibers.size())) {
      arrived = 0;
      ++generation;
      ++progress;
    }
    while (generation == mine) yield();
  }

  // Two sets of slots suffice: no lane can be two shuffles ahead of another.
  float shuffle(float value, int source) {
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
    return slots[source];
  }

  static bool idle() {
    return std::any_of(block_idles.begin(), block_idles.end(), [](auto wake) { return wake(); });
  }

  void run(int threads_of_block, int blocks);
};

inline Block block;
inline dim3 first_block;  // of the cluster
inline dim3 block_index() {
  return dim3(first_block.x + static_cast<unsigned>(block.rank()), first_block.y);
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return static_cast<unsigned>(block.current % block.threads); }
  } x;
};

inline void enter_fiber() {
  block.body();
  for (const auto end : thread_ends) end();
  block.fibers[block.current].done = true;
  ++block.progress;
  block.yield();
}

inline void Block::run(int threads_of_block, int blocks) {
  threads = threads_of_block;
  cluster = blocks;
  const int count = threads * cluster;
  if (static_cast<int>(fibers.size()) != count) fibers = std::vector<Fiber>(count);
  warps.assign((count + kLanes - 1) / kLanes, Warp());
  arrived = 0;
  for (const auto start : block_starts) start();
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter_fiber, 0);
  }
  int paused = -1;
  for (int left = count; left > 0;) {
    const int64_t before = progress;
    left = 0;
    for (int turn = 0; turn < count; ++turn) {
      current = descending ? count - 1 - turn : turn;
      if (fibers[current].done) continue;
      ++left;
      if (rank() == paused) continue;
      if (fibers[current].ready != nullptr && !(*fibers[current].ready)()) continue;
      swapcontext(&scheduler, &fibers[current].context);
      left -= fibers[current].done;
    }
    if (paused >= 0) {
      paused = -1;
      continue;
    }
    if (cluster > 1 && block_pauses()) paused = static_cast<int>(progress % cluster);
    if (left > 0 && progress == before && !idle()) {
      std::fprintf(stderr, "%d threads wait for threads that never come\n", left);
      const char* last = nullptr;
      for (const Fiber& fiber : fibers) {
        if (fiber.done || fiber.waits_for == last) continue;
        last = fiber.waits_for;
        std::fprintf(stderr, "rule: every wait ends: %s\n", last);
      }
      std::abort();
    }
  }
  for (const auto end : block_ends) end();
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  ++launches;
  if (config->dynamicSmemBytes > 0) ++dynamic_launches;
  if (mixed) descending = static_cast<uint32_t>(launches) * 2654435761u >> 31 != 0;
  block.dynamic_bytes = config->dynamicSmemBytes;
  block.body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  unsigned cluster = 1;
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    const cudaLaunchAttribute& attribute = config->attrs[k];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
  }
  if (config->gridDim.x % cluster != 0) broken("a grid consists of whole clusters");
  for (unsigned y = 0; y < config->gridDim.y; ++y) {
    for (unsigned x = 0; x < config->gridDim.x; x += cluster) {
      first_block = dim3(x, y);
      block.run(static_cast<int>(config->blockDim.x), static_cast<int>(cluster));
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

#define cudaLaunchKernelEx emulation::launch
static const emulation::ThreadIndex threadIdx;
#define blockIdx emulation::block_index()

inline void __syncthreads() { emulation::block.synchronize(); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
// The value of a lane of the warp; any type of 4 bytes.
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  static_assert(sizeof(T) == sizeof(float), "slots hold 4 bytes");
  float bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = emulation::block.shuffle(bits, source);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  return __shfl_sync(lanes, value, static_cast<int>(threadIdx.x % emulation::kLanes) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned lanes, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % emulation::kLanes);
  return __shfl_sync(lanes, value, lane >= distance ? lane - distance : lane);
}
inline unsigned __ballot_sync(unsigned lanes, bool predicate) {
  unsigned bits = (predicate ? 1u : 0u) << threadIdx.x % emulation::kLanes;
  for (int mask = 1; mask < emulation::kLanes; mask *= 2) {
    bits |= __shfl_xor_sync(lanes, bits, mask);
  }
  return bits;
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
