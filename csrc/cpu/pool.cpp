#include "cpu/pool.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(_M_X64)
#include <intrin.h>
#endif

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>

namespace unitsface::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// A thread that waits looks for this long before it sleeps: through the calls of the next kernels,
// which takes Python less, and the last chunks of a loop.
constexpr auto kSpin = std::chrono::microseconds(400);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#elif defined(_M_X64)
  _mm_pause();
#endif
}

// Whether `holds` did within kSpin.
template <class Condition>
bool spin_until(const Condition& holds) {
  const auto deadline = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (holds()) return true;
      pause();
    }
  } while (Clock::now() < deadline);
  return false;
}

// New threads have the affinity of the calling one. An OpenMP runtime that binds its threads has
// bound that to one core, which would then be the core of all.
void unbind() {
#if defined(__linux__)
  bool bound = false;
  for (const char* name : {"OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"}) {
    const char* value = std::getenv(name);
    bound |= value != nullptr && std::strcmp(value, "false") != 0;
  }
  if (!bound) return;
  cpu_set_t all;
  std::memset(&all, 0xff, sizeof all);     // the kernel takes those that the process may use
  sched_setaffinity(0, sizeof all, &all);  // of this thread
#endif
}

class Pool {
 public:
  void run(int64_t count, int threads, RunChunk run, const void* body) {
    const int64_t useful = count < threads ? count : threads;
    if (useful < 2 || busy_.exchange(true)) {
      for (int64_t i = 0; i < count; ++i) run(body, i, 0);
      return;
    }
    const uint64_t helpers = started(static_cast<uint64_t>(useful) - 1);
    run_ = run;
    body_ = body;
    count_ = count;
    std::fegetenv(&environment_);
    next_.store(0, std::memory_order_relaxed);
    entry_.store(helpers * kSeat);
    if (sleeping_.load() > 0) {
      // Taken once, so that a thread without a seat is asleep by now.
      {
        const std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
    take_chunks(0);
    entry_.fetch_and(kSeat - 1);  // too late to enter
    const auto left = [&] { return entry_.load() == 0; };
    if (!spin_until(left)) {
      std::unique_lock<std::mutex> lock(mutex_);
      waiting_.store(true);
      done_.wait(lock, left);
      waiting_.store(false);
    }
    busy_.store(false);
  }

 private:
  // Starts threads until there are `wanted`, or the system refuses; their number, `wanted` at most.
  uint64_t started(uint64_t wanted) {
    try {
      for (; size_ < wanted; ++size_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
    }
    return size_ < wanted ? size_ : wanted;
  }

  void serve() {
    unbind();
    for (;;) {
      uint64_t slot = 0;
      const auto entered = [&] { return (slot = enter()) != 0; };
      if (!spin_until(entered)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, entered);
        sleeping_.fetch_sub(1);
      }
      // The rounding, and whether denormals are flushed to zero.
      std::fesetenv(&environment_);
      take_chunks(static_cast<int>(slot));
      if (entry_.fetch_sub(1) == 1 && waiting_.load()) {
        const std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  // Takes a seat: from 1 on, or 0 if none is left.
  uint64_t enter() {
    uint64_t entry = entry_.load();
    while (entry >= kSeat) {
      if (entry_.compare_exchange_weak(entry, entry - kSeat + 1)) return entry / kSeat;
    }
    return 0;
  }

  void take_chunks(int slot) {
    for (;;) {
      const int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= count_) return;
      run_(body_, chunk, slot);
    }
  }

  // One loop at a time, written by its calling thread while no other thread is inside.
  RunChunk run_ = nullptr;
  const void* body_ = nullptr;
  int64_t count_ = 0;
  std::fenv_t environment_{};
  std::atomic<bool> busy_{false};
  uint64_t size_ = 0;
  // Threads inside the loop, and kSeat times the number that may still enter.
  static constexpr uint64_t kSeat = uint64_t{1} << 32;
  alignas(64) std::atomic<uint64_t> entry_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  // A thread sets its flag before its last check and its sleep.
  alignas(64) std::atomic<int> sleeping_{0};
  std::atomic<bool> waiting_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
};

// Never destroyed: its threads last until the process ends.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  Pool* found = current.load();
  if (found == nullptr) {
    auto* made = new Pool;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

#if !defined(_WIN32)
// A forked process has no thread but the calling one, and no use for the old pool, whose lock may
// be held.
[[maybe_unused]] const int forget =
    pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
#endif

}  // namespace

void run_chunks(int64_t count, int threads, RunChunk run, const void* body) {
  pool().run(count, threads, run, body);
}

}  // namespace unitsface::cpu
