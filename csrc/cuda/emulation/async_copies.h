// Asynchronous copies. One lands when its thread waits for it, the last moment that the ISA allows,
// or at an earlier one, as if by chance: with EMULATION_SEED=0 never earlier.
#pragma once

#include <deque>

#include "shared_memory.h"

namespace emulation {

inline uint64_t chance = [] {
  const char* seed = std::getenv("EMULATION_SEED");
  return seed == nullptr ? 1u : std::strtoull(seed, nullptr, 10);
}();
inline bool always_late = chance == 0;
inline void choose_order(uint64_t seed) { chance = seed, always_late = seed == 0; }

// True in one of four cases.
inline bool by_chance() {
  chance = chance * 6364136223846793005u + 1442695040888963407u;
  return !always_late && chance >> 62 == 0;
}

// One of `count` things: as if by chance, the last of them if nothing is early.
inline size_t any_of(size_t count) {
  by_chance();
  return always_late ? count - 1 : static_cast<size_t>(chance >> 33) % count;
}

struct AsyncCopy {
  char* target;
  const char* source;
  size_t bytes;
  bool landed = false;

  void land() {
    if (landed) return;
    landed = true;
    std::memcpy(target, source, bytes);
  }
};

// The copies of one thread: groups, the last of which is open.
class CopyGroups {
 public:
  void start(void* target, const void* source, size_t bytes) {
    shared_memory.start_copy(target, bytes);
    open_.push_back({static_cast<char*>(target), static_cast<const char*>(source), bytes});
    land_some();
  }

  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
    land_some();
  }

  void wait(size_t pending) {
    while (groups_.size() > pending) {
      for (AsyncCopy& copy : groups_.front()) {
        copy.land();
        shared_memory.finish_copy(copy.target, copy.bytes);
      }
      groups_.pop_front();
    }
    land_some();
  }

  void require_none() const {
    for (const auto& group : groups_) {
      if (!group.empty()) broken("cp.async.wait_group before the thread ends");
    }
    if (!open_.empty()) broken("cp.async.commit_group before the thread ends");
  }

  void forget() {
    groups_.clear();
    open_.clear();
  }

 private:
  void land_some() {
    for (auto& group : groups_) {
      for (AsyncCopy& copy : group) {
        if (by_chance()) copy.land();
      }
    }
    for (AsyncCopy& copy : open_) {
      if (by_chance()) copy.land();
    }
  }

  std::deque<std::vector<AsyncCopy>> groups_;
  std::vector<AsyncCopy> open_;
};

inline std::vector<CopyGroups> copy_groups;
inline CopyGroups& own_copies() {
  if (copy_groups.size() <= static_cast<size_t>(block.current)) {
    copy_groups.resize(block.fibers.size());
  }
  return copy_groups[block.current];
}
inline const bool copies_are_checked = [] {
  block_ends.push_back([] {
    for (CopyGroups& groups : copy_groups) groups.require_none(), groups.forget();
  });
  return true;
}();

}  // namespace emulation
