// mbarriers with phases and transaction counts, named barriers, and register reallocation.
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
    if (pending > 0 || transactions > 0) return;
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

struct NamedBarrier {
  int count = 0, arrived = 0;
  int64_t generation = 0;
  Clock arriving, completed;
};

struct Barriers {
  std::map<size_t, Mbarrier> mbarriers;  // by offset in shared memory
  NamedBarrier named[16];
  // setmaxnreg: registers per thread of each warp, and free ones of the block.
  std::vector<int> registers;
  int64_t pool = 0;

  void begin() {
    mbarriers.clear();
    for (NamedBarrier& barrier : named) barrier = NamedBarrier();
    const int launched = std::min(65536 / machine.threads / 8 * 8, 255);
    registers.assign(machine.threads / kLanes, launched);
    pool = 0;
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
  Mbarrier& at(const void* address) {
    const auto found = mbarriers.find(machine.offset_of(address));
    require(found != mbarriers.end() && machine.seen(found->second.initialized),
            "a barrier between mbarrier.init and the use of the mbarrier");
    return found->second;
  }
  void arrive(const void* address, int64_t bytes) {
    Mbarrier& barrier = at(address);
    require(barrier.pending > 0, "an mbarrier has no more arrivals in a phase than its count");
    barrier.transactions += bytes;
    barrier.announced += bytes;
    machine.release(barrier.arriving);
    --barrier.pending;
    barrier.complete_if_due();
  }
  void wait(const void* address, uint32_t parity) {
    Mbarrier& barrier = at(address);
    block.wait("mbarrier.try_wait: a phase whose arrivals or bytes never come",
               [&] { return (barrier.phase & 1) != parity; });
    machine.acquire(barrier.completed);
  }

  NamedBarrier& named_arrival(int id, int count) {
    require(id >= 0 && id < 16, "a block has 16 named barriers");
    require(count % kLanes == 0 && count <= machine.threads, "a named barrier counts whole warps");
    NamedBarrier& barrier = named[id];
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
  void named_sync(int id, int count) {
    NamedBarrier& barrier = named_arrival(id, count);
    const int64_t mine = barrier.generation;
    complete_if_due(barrier);
    block.wait("bar.sync: a named barrier at which too few threads arrive",
               [&] { return barrier.generation != mine; });
    machine.acquire(barrier.completed);
  }

  void reallocate(int wanted, bool more) {
    require(wanted >= 24 && wanted <= 256 && wanted % 8 == 0,
            "setmaxnreg takes a multiple of 8 from 24 to 256");
    int& mine = registers[block.current / kLanes];
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
  return true;
}();

}  // namespace emulation
