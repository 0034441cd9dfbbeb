// mbarriers with phases and transaction counts, named and cluster barriers, and register
// reallocation.
#pragma once

#include "machine.h"

namespace emulation {

struct Mbarrier {
  int index = 0;
  int64_t count = 0, pending = 0;
  uint32_t phase = 0;
  int64_t transactions = 0;           // bytes that the phase still expects
  int64_t announced = 0, issued = 0;  // bytes of the phase: expected, and of copies so far
  Event initialized;
  bool fenced = false;
  Clock arriving, completed;

  void complete_if_due() {
    if (pending > 0 || transactions != 0) return;
    pending = count;
    announced = issued = 0;
    ++phase;
    Machine::join(completed, arriving);
    completed[machine.threads + index] = phase;
    ++block.progress;
  }
  void complete_transactions(int64_t bytes) {
    transactions -= bytes;
    complete_if_due();
  }
};

// Of a block or a cluster.
struct NamedBarrier {
  int count = 0, arrived = 0;
  int64_t generation = 0;
  Clock arriving, completed;
};

struct Barriers {
  std::map<size_t, Mbarrier> mbarriers;             // by offset in shared memory
  std::vector<std::array<NamedBarrier, 16>> named;  // of each block
  NamedBarrier cluster;
  // setmaxnreg: registers per thread of each warp, and free ones of each block.
  std::vector<int> registers;
  std::vector<int64_t> pools;

  void begin() {
    mbarriers.clear();
    named.assign(block.cluster, {});
    cluster = NamedBarrier();
    cluster.count = machine.threads;
    const int launched = std::min(65536 / block.threads / 8 * 8, 255);
    registers.assign(machine.threads / kLanes, launched);
    pools.assign(block.cluster, 0);
  }

  void initialize(const void* address, int count) {
    const size_t offset = machine.offset_of(address);
    require(offset % 8 == 0, "an mbarrier is aligned to 8 bytes");
    require(mbarriers.count(offset) == 0, "an mbarrier is initialized once");
    require(count > 0 && mbarriers.size() < kMostBarriers, "mbarrier.init has a valid count");
    Mbarrier barrier;
    barrier.index = static_cast<int>(mbarriers.size());
    barrier.count = barrier.pending = count;
    barrier.initialized = machine.now();
    barrier.arriving.assign(machine.threads + kMostBarriers, 0);
    barrier.completed = barrier.arriving;
    mbarriers[offset] = barrier;
  }
  void fence_initialization() {
    for (auto& [offset, barrier] : mbarriers) {
      if (barrier.initialized.thread == block.current) barrier.fenced = true;
    }
  }
  Mbarrier& at(size_t offset) {
    const auto found = mbarriers.find(offset);
    require(found != mbarriers.end() && machine.seen(found->second.initialized),
            machine.block_of(offset) == block.rank()
                ? "a barrier between mbarrier.init and the use of the mbarrier"
                : "a cluster barrier between mbarrier.init and the use by another block");
    return found->second;
  }
  void arrive(size_t offset, int64_t bytes) {
    Mbarrier& barrier = at(offset);
    require(barrier.pending > 0, "an mbarrier has no more arrivals in a phase than its count");
    const int rank = machine.block_of(offset);
    if (rank != block.rank()) machine.remote[rank][block.current] = machine.now().step;
    barrier.transactions += bytes;
    barrier.announced += bytes;
    machine.release(barrier.arriving);
    --barrier.pending;
    require(barrier.pending > 0 || barrier.issued <= barrier.announced, kCountedElsewhere);
    barrier.complete_if_due();
  }
  static constexpr const char* kCountedElsewhere =
      "mbarrier.expect_tx counts what other blocks copy, too";
  void wait(const void* address, uint32_t parity) {
    Mbarrier& barrier = at(machine.offset_of(address));
    block.wait("mbarrier.try_wait: a phase whose arrivals or bytes never come",
               [&] { return (barrier.phase & 1) != parity; });
    machine.acquire(barrier.completed);
  }

  NamedBarrier& named_arrival(int id, int count) {
    require(id >= 0 && id < 16, "a block has 16 named barriers");
    require(count % kLanes == 0 && count <= block.threads, "a named barrier counts whole warps");
    NamedBarrier& barrier = named[block.rank()][id];
    if (barrier.arrived == 0) barrier.count = count;
    require(barrier.count == count, "all threads of a named barrier give the same count");
    machine.release(barrier.arriving);
    return barrier;
  }
  static void complete_if_due(NamedBarrier& barrier) {
    if (++barrier.arrived < barrier.count) return;
    barrier.arrived = 0;
    barrier.completed = barrier.arriving;
    ++barrier.generation;
    ++block.progress;
  }
  void named_arrive(int id, int count) { complete_if_due(named_arrival(id, count)); }
  static void sync(NamedBarrier& barrier, const char* what) {
    const int64_t mine = barrier.generation;
    complete_if_due(barrier);
    block.wait(what, [&] { return barrier.generation != mine; });
    machine.acquire(barrier.completed);
  }
  void named_sync(int id, int count) {
    sync(named_arrival(id, count), "bar.sync: a named barrier at which too few threads arrive");
  }

  void cluster_sync() {
    machine.release(cluster.arriving);
    sync(cluster, "barrier.cluster: threads of the cluster that never arrive");
  }
  // Threads that have ended are not waited for.
  void end_thread() {
    --cluster.count;
    if (cluster.arrived > 0 && cluster.arrived == cluster.count) {
      --cluster.arrived;
      complete_if_due(cluster);
    }
  }

  void reallocate(int wanted, bool more) {
    require(wanted >= 24 && wanted <= 256 && wanted % 8 == 0,
            "setmaxnreg takes a multiple of 8 from 24 to 256");
    int& mine = registers[block.current / kLanes];
    int64_t& pool = pools[block.rank()];
    machine.converge("setmaxnreg", [&] {
      require(more ? wanted >= mine : wanted <= mine,
              "setmaxnreg.inc does not lower the registers, .dec does not raise them");
      if (!more) {
        pool += static_cast<int64_t>(mine - wanted) * kLanes;
        mine = wanted;
        ++block.progress;
      }
    });
    if (!more) return;
    block.wait("setmaxnreg.inc: registers that the block does not have", [&] {
      const int64_t needed = static_cast<int64_t>(wanted - mine) * kLanes;
      if (needed > pool) return false;
      pool -= needed;
      mine = wanted;
      return true;
    });
  }
};

inline Barriers barriers;
inline const bool barriers_take_part = [] {
  block_starts.push_back([] { barriers.begin(); });
  thread_ends.push_back([] { barriers.end_thread(); });
  return true;
}();

}  // namespace emulation
