// Checks of the kernels' threads, for ThreadSanitizer as well: several calling threads, loops of
// any size inside each other, and a thread that stops in the middle of its chunk.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/pool.h"

namespace {

using unitsface::cpu::parallel_chunks;
using unitsface::cpu::parallel_rows;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// Every chunk once, by at most `threads` threads of different slots.
void check_loop(int64_t count, int threads) {
  std::vector<int> runs(static_cast<size_t>(count), 0);
  const auto taken = std::make_unique<std::atomic<bool>[]>(threads > 0 ? threads : 1);
  std::atomic<bool> apart{true};
  parallel_chunks(count, threads, [&](int64_t i, int slot) {
    if (slot != 0 && slot >= threads) apart = false;
    if (taken[slot].exchange(true)) apart = false;
    ++runs[static_cast<size_t>(i)];
    taken[slot].store(false);
  });
  require(apart, "two threads had one slot");
  for (const int n : runs) require(n == 1, "a chunk did not run once");
}

void check_rows(int64_t n, int64_t width) {
  std::vector<int> runs(static_cast<size_t>(n), 0);
  parallel_rows(n, width, 3, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
  for (const int times : runs) require(times == 1, "a row did not run once");
}

void check_nested() {
  std::atomic<int64_t> sum{0};
  parallel_chunks(
      6, 4, [&](int64_t i, int) { parallel_chunks(i, 4, [&](int64_t j, int) { sum += j + 1; }); });
  require(sum == 35, "loops inside a loop");
}

// Whether a second thread came, whose first chunk then goes on until all others have run: those
// must not be the share of a thread.
bool check_stopped() {
  constexpr int64_t kCount = 9;
  std::atomic<int64_t> finished{0};
  std::atomic<bool> came{false};
  parallel_chunks(kCount, 2, [&](int64_t, int slot) {
    if (slot == 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    } else if (!came.exchange(true)) {
      const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (finished < kCount - 1) {
        require(std::chrono::steady_clock::now() < limit, "chunks waited for a stopped thread");
        std::this_thread::yield();
      }
    }
    ++finished;
  });
  require(finished == kCount, "a chunk is missing");
  return came;
}

}  // namespace

int main() {
  for (const int threads : {-1, 0, 1, 2, 3, 7}) {
    for (const int64_t count : {0, 1, 2, 3, 8, 50, 1000}) check_loop(count, threads);
  }
  for (const int64_t width : {0, 1, 100, 40000}) check_rows(700, width);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([caller] {
      for (int round = 0; round < 200; ++round) {
        check_loop(round % 40, 1 + (round + caller) % 4);
        check_nested();
        // Long enough for the others to sleep.
        if (round % 20 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  int stopped = 0;
  for (int round = 0; round < 1000 && stopped < 20; ++round) stopped += check_stopped();
  require(stopped > 0, "a second thread never came");
  std::puts("ok");
}
