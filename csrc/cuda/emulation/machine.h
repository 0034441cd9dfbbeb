// What a cluster of Hopper has beside its threads, as the emulation sees it: who has seen what of
// the others' work (vector clocks), and for every 16 bytes of dynamic shared memory who has written
// it and which asynchronous reads and writes are under way. A broken rule of the PTX ISA aborts
// with the rule's name on stderr. A block without a cluster is a cluster of one.
//
// An asynchronous copy lands when no thread can go on, the last moment that the ISA allows, or at a
// random earlier one (async_copies.h). What it has not written yet is NaN.
#pragma once

#include <array>
#include <map>

#include "async_copies.h"

namespace emulation {

constexpr int kWarpgroup = 128;
constexpr int kMostBarriers = 64;  // mbarriers of a cluster
constexpr size_t kGrain = 16;      // bytes of shared memory that are looked at together

inline void require(bool condition, const char* rule) {
  if (!condition) broken(rule);
}

// Entry t: how many steps of thread t are known to be done; entry threads + b: phases of mbarrier
// b.
using Clock = std::vector<uint32_t>;

// A step of a thread, which others must know to be done before they touch the same memory.
struct Event {
  int thread = -1;
  uint32_t step = 0;
};

struct Wgmma;  // wgmma.h

struct Grain {
  Event written, fenced;         // by a thread; fenced for the asynchronous proxy, or not
  Event store_read;              // the last bulk store has read it
  int landing = 0;               // copies that write it
  int reading = 0;               // wgmma and bulk stores that read it
  const Wgmma* readers[4] = {};  // the last of each warpgroup of the block
  // What the last copy wrote: a piece of 16 bytes of a row of the tensor.
  const void* tensor = nullptr;
  int64_t row = 0, piece = 0;
  int barrier = -1;
  uint32_t phase = 0;  // that completed the copy
};

struct Word {
  Event written;
  std::vector<Event> reads;  // since then
};

struct Machine {
  int threads = 0;   // of the cluster
  size_t bytes = 0;  // of shared memory of each block
  unsigned char* shared = nullptr;
  std::vector<int> running;   // threads of each block that have not ended
  std::vector<Clock> remote;  // by block: the last steps in which others arrived at its mbarriers
  std::vector<Clock> clocks;
  std::vector<Grain> grains;
  std::map<size_t, Word> words;               // by offset / 4
  std::vector<std::vector<size_t>> unfenced;  // grains that a thread has written

  struct Convergence {
    const char* what = nullptr;
    int arrived = 0;
    int64_t generation = 0;
  };
  std::vector<Convergence> warps;

  Machine() = default;
  ~Machine() { std::free(shared); }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  void begin(int count, size_t dynamic_bytes) {
    require(dynamic_bytes <= 232448, "a block has at most 227 KB of shared memory");
    threads = count;
    std::free(shared);
    bytes = (dynamic_bytes + 1023) / 1024 * 1024;
    shared = static_cast<unsigned char*>(std::aligned_alloc(1024, block.cluster * bytes + 1024));
    std::memset(shared, 0xff, block.cluster * bytes);
    running.assign(block.cluster, block.threads);
    remote.assign(block.cluster, Clock(threads, 0));
    clocks.assign(threads, Clock(threads + kMostBarriers, 0));
    for (int t = 0; t < threads; ++t) clocks[t][t] = 1;
    grains.assign(block.cluster * bytes / kGrain, Grain());
    words.clear();
    unfenced.assign(threads, {});
    warps.assign((threads + kLanes - 1) / kLanes, Convergence());
  }

  int me() const { return block.current; }
  Event now() { return {me(), clocks[me()][me()]}; }
  bool seen(const Event& event) {
    return event.thread < 0 || event.thread == me() || clocks[me()][event.thread] >= event.step;
  }
  static void join(Clock& into, const Clock& from) {
    if (into.empty()) into.assign(from.size(), 0);
    for (size_t k = 0; k < from.size(); ++k) into[k] = std::max(into[k], from[k]);
  }
  void release(Clock& into) {
    join(into, clocks[me()]);
    ++clocks[me()][me()];
  }
  void acquire(const Clock& from) { join(clocks[me()], from); }

  // In the shared memory of the cluster; the address is one of the thread's own block.
  size_t offset_of(const void* pointer) const {
    require(owns(pointer), "the address is one of shared memory");
    const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(pointer) - shared);
    require(block_of(offset) == block.rank(), "mapa gives an address of another block's memory");
    return offset;
  }
  // The same place of another block.
  size_t offset_in(const void* pointer, int rank) const {
    require(rank >= 0 && rank < block.cluster, "mapa names a block of the cluster");
    require(running[rank] > 0, "a block has not ended when others access its shared memory");
    return offset_of(pointer) % bytes + rank * bytes;
  }
  int block_of(size_t offset) const { return static_cast<int>(offset / bytes); }

  bool owns(const void* pointer) const {
    const auto* byte = static_cast<const unsigned char*>(pointer);
    return shared != nullptr && byte >= shared && byte < shared + block.cluster * bytes;
  }

  void end_thread() {
    const int rank = block.rank();
    if (--running[rank] > 0) return;
    Clock seen;
    for (int t = 0; t < block.threads; ++t) join(seen, clocks[rank * block.threads + t]);
    for (int t = 0; t < threads; ++t) {
      require(seen[t] >= remote[rank][t],
              "a cluster barrier between arrivals at another block's mbarriers and its end");
    }
  }

  // Plain accesses of a thread to words of 4 bytes that no copy has to do with.
  void access(const void* pointer, size_t size, bool writes) {
    const size_t offset = offset_of(pointer);
    for (size_t place = offset / 4; place <= (offset + size - 1) / 4; ++place) {
      require(grains[place * 4 / kGrain].landing == 0 && grains[place * 4 / kGrain].reading == 0,
              "threads do not touch shared memory that a copy uses");
      Word& word = words[place];
      require(seen(word.written), writes
                                      ? "a barrier between writes of the same shared memory"
                                      : "a barrier between writing shared memory and reading it");
      if (!writes) {
        if (word.reads.empty() || word.reads.back().thread != me()) word.reads.push_back(now());
        word.reads.back() = now();
        continue;
      }
      for (const Event& read : word.reads) {
        require(seen(read), "a barrier between reading shared memory and writing it again");
      }
      word.reads.clear();
      word.written = now();
    }
  }

  // An instruction that all lanes of a warp run together; `last` runs once, when all are there.
  template <class Last>
  void converge(const char* what, const Last& last) {
    Convergence& warp = warps[me() / kLanes];
    if (warp.arrived == 0) warp.what = what;
    require(std::strcmp(warp.what, what) == 0, "lanes of a warp run the same aligned instruction");
    const int64_t mine = warp.generation;
    if (++warp.arrived == kLanes) {
      last();
      Clock all;
      const int first = me() / kLanes * kLanes;
      for (int t = first; t < first + kLanes; ++t) join(all, clocks[t]);
      for (int t = first; t < first + kLanes; ++t) {
        join(clocks[t], all);
        ++clocks[t][t];
      }
      warp.arrived = 0;
      ++warp.generation;
      ++block.progress;
    }
    block.wait(what, [&] { return warp.generation != mine; });
  }

  // 16 bytes by a thread (the generic proxy).
  void write(size_t offset, const void* data, const Event& writer) {
    require(offset % kGrain == 0, "a store of 16 bytes is aligned");
    Grain& grain = grains[offset / kGrain];
    require(grain.landing == 0, "shared memory is not written while a copy writes it");
    require(grain.reading == 0,
            "cp.async.bulk.wait_group.read before the buffer of a bulk store is written again");
    require(seen(grain.store_read), "a barrier between wait_group.read and the next writes");
    require(seen(grain.written), "a barrier between writes of the same shared memory");
    grain.written = writer;
    grain.fenced = {};
    grain.tensor = nullptr;
    unfenced[writer.thread].push_back(offset / kGrain);
    std::memcpy(shared + offset, data, kGrain);
  }

  void fence_proxy() {
    for (const size_t g : unfenced[me()]) {
      if (grains[g].written.thread == me()) grains[g].fenced = now();
    }
    unfenced[me()].clear();
  }
};

inline Machine machine;
inline const bool machine_starts = [] {
  shared_memory.elsewhere = [](const void* pointer, size_t size, bool writes) {
    if (!machine.owns(pointer)) return false;
    machine.access(pointer, size, writes);
    return true;
  };
  block_starts.push_back(
      [] { machine.begin(static_cast<int>(block.fibers.size()), block.dynamic_bytes); });
  thread_ends.push_back([] { machine.end_thread(); });
  block_pauses = by_chance;
  return true;
}();

}  // namespace emulation
