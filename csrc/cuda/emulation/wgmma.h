// wgmma.mma_async of m64n128k16 with both operands in shared memory: descriptors, groups, fences.
//
// A multiplication is done when a thread waits for its group, the last moment that the ISA allows,
// or at a random earlier one. Until a thread has waited, its accumulator is NaN.
#pragma once

#include "tma.h"

namespace emulation {

// A matrix descriptor of the shared memory of a block, which begins at `base`: bits 0-13 start,
// 16-29 leading and 32-45 stride byte offset, all in units of 16 bytes, 49-51 base offset, 62-63
// the swizzle (1: 128 bytes).
struct Operand {
  size_t start, stride;

  Operand(uint64_t bits, size_t base) {
    start = base + ((bits & 0x3fff) << 4);
    stride = (bits >> 32 & 0x3fff) << 4;
    require(bits >> 62 == 1, "a descriptor has the swizzle of the copy that wrote the operand");
    require((bits >> 49 & 7) == 0, "a descriptor's base offset is 0 for aligned patterns");
  }
  // Offset of a piece of 16 bytes: rows lie in groups of eight, 128 bytes apart.
  size_t place(int row, int piece) const {
    const size_t plain = start + static_cast<size_t>(row / 8) * stride +
                         static_cast<size_t>(row % 8) * 128 + 16 * static_cast<size_t>(piece);
    return plain ^ ((plain >> 7 & 7) << 4);
  }
};

using Fragment = float (*)[4];  // [16][4]: columns 8 c + 2 (lane % 4) + {0, 1} of two rows

struct Wgmma {
  uint64_t a, b;
  bool half, add;
  int warpgroup;
  Fragment fragments[kWarpgroup] = {};
  int issued = 0, waited = 0;
  bool done = false;
  Event waits[kWarpgroup / kLanes];
  std::vector<std::pair<int, uint32_t>> phases;  // (mbarrier, phase) of what it reads

  int rank() const { return warpgroup * kWarpgroup / block.threads; }
  Operand left() const { return {a, rank() * machine.bytes}; }
  Operand right() const { return {b, rank() * machine.bytes}; }
};

struct TensorCores {
  struct Thread {
    size_t next = 0, waited = 0;  // multiplications of the warpgroup
    std::vector<size_t> groups;   // multiplications up to each committed group
    bool fenced = false;
    std::map<Fragment, std::array<float, 64>> accumulators;  // of those under way
  };
  std::vector<std::deque<Wgmma>> queues;  // by warpgroup
  std::vector<Thread> threads;

  void begin() {
    queues.assign((machine.threads + kWarpgroup - 1) / kWarpgroup, {});
    threads.assign(machine.threads, Thread());
  }

  template <class Each>
  static void grains(const Wgmma& op, const Each& each) {
    const Operand a = op.left(), b = op.right();
    for (int k = 0; k < 64 + 128; ++k) {
      for (int piece = 0; piece < 2; ++piece) {
        const size_t offset = k < 64 ? a.place(k, piece) : b.place(k - 64, piece);
        require(machine.block_of(offset) == op.rank(),
                "a descriptor's matrix lies in shared memory");
        each(machine.grains[offset / kGrain], k < 64 ? k : k - 64, piece);
      }
    }
  }

  void start(Wgmma& op) {
    const Grain* corner = nullptr;
    grains(op, [&](Grain& grain, int row, int piece) {
      require(grain.landing == 0, "a wait for the phase of a copy before wgmma reads it");
      require(grain.tensor != nullptr, "wgmma reads what a copy has written");
      if (row == 0 && piece == 0) corner = &grain;
      require(grain.tensor == corner->tensor && grain.row == corner->row + row &&
                  grain.piece == corner->piece + piece,
              "a descriptor reads rows and columns in the order in which the copy wrote them");
      const auto phase = std::make_pair(grain.barrier, grain.phase);
      if (op.phases.empty() || op.phases.back() != phase) op.phases.push_back(phase);
      ++grain.reading;
    });
  }

  void issue(uint64_t a, uint64_t b, bool half, bool add, Fragment fragment) {
    const int me = block.current, warpgroup = me / kWarpgroup;
    Thread& thread = threads[me];
    std::deque<Wgmma>& queue = queues[warpgroup];
    require(thread.fenced, "wgmma.fence before the first wgmma of a group");
    if (thread.next == queue.size()) {
      queue.push_back({a, b, half, add, warpgroup});
      start(queue.back());
    }
    Wgmma& op = queue[thread.next++];
    require(op.a == a && op.b == b && op.half == half && op.add == add,
            "all threads of a warpgroup run the same wgmma");
    for (const auto& [barrier, phase] : op.phases) {
      require(machine.clocks[me][machine.threads + barrier] > phase,
              "a wait for the phase of a copy before wgmma reads it");
    }
    op.fragments[me % kWarpgroup] = fragment;
    if (thread.accumulators.count(fragment) == 0) {
      std::memcpy(thread.accumulators[fragment].data(), fragment, sizeof(float[64]));
      std::fill(&fragment[0][0], &fragment[0][0] + 64, std::numeric_limits<float>::quiet_NaN());
    }
    ++op.issued;
    ++block.progress;
  }

  static float element(size_t offset, bool half) {
    uint16_t bits;
    std::memcpy(&bits, machine.shared + offset, sizeof(bits));
    if (!half) {
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      float value;
      std::memcpy(&value, &wide, sizeof(value));
      return value;
    }
    __half value;
    std::memcpy(&value, &bits, sizeof(bits));
    return __half2float(value);
  }

  void multiply(Wgmma& op) {
    const Operand a = op.left(), b = op.right();
    static float left[64][16], right[128][16];
    for (int k = 0; k < 64 + 128; ++k) {
      for (int c = 0; c < 16; ++c) {
        const size_t offset = k < 64 ? a.place(k, c / 8) : b.place(k - 64, c / 8);
        (k < 64 ? left[k] : right[k - 64])[c] = element(offset + c % 8 * 2, op.half);
      }
    }
    for (int t = 0; t < kWarpgroup; ++t) {
      float* sums = threads[op.warpgroup * kWarpgroup + t].accumulators[op.fragments[t]].data();
      for (int k = 0; k < 64; ++k) {
        const float* x = left[t / kLanes * 16 + t % kLanes / 4 + k % 4 / 2 * 8];
        const float* y = right[k / 4 * 8 + t % 4 * 2 + k % 2];
        float sum = 0.0f;
        for (int c = 0; c < 16; ++c) sum += x[c] * y[c];
        sums[k] = op.add ? sums[k] + sum : sum;
      }
    }
    op.done = true;
  }

  void commit() {
    Thread& thread = threads[block.current];
    thread.groups.push_back(thread.next);
    thread.fenced = false;
  }

  void wait(size_t left) {
    const int me = block.current;
    Thread& thread = threads[me];
    std::deque<Wgmma>& queue = queues[me / kWarpgroup];
    const size_t groups = thread.groups.size();
    const size_t first = thread.waited, end = groups > left ? thread.groups[groups - 1 - left] : 0;
    for (; thread.waited < end; ++thread.waited) {
      const Wgmma& op = queue[thread.waited];
      block.wait("wgmma: the other warps of the warpgroup",
                 [&] { return op.issued == kWarpgroup; });
      finish_until(queue, thread.waited);
    }
    machine.converge("wgmma.wait_group", [&] {
      for (size_t k = first; k < end; ++k) {
        Wgmma& op = queue[k];
        op.waits[me % kWarpgroup / kLanes] = machine.now();
        op.waited += kLanes;
        if (op.waited < kWarpgroup) continue;
        grains(op, [&](Grain& grain, int, int) {
          --grain.reading;
          grain.readers[op.warpgroup % (block.threads / kWarpgroup)] = &op;
        });
      }
    });
    // Registers of which nothing is under way any more.
    for (auto entry = thread.accumulators.begin(); entry != thread.accumulators.end();) {
      if (under_way(thread, queue, entry->first)) {
        ++entry;
        continue;
      }
      std::memcpy(entry->first, entry->second.data(), sizeof(float[64]));
      entry = thread.accumulators.erase(entry);
    }
  }

  bool under_way(const Thread& thread, const std::deque<Wgmma>& queue, Fragment fragment) const {
    for (size_t k = thread.waited; k < thread.next; ++k) {
      if (queue[k].fragments[block.current % kWarpgroup] == fragment) return true;
    }
    return false;
  }

  void finish_until(std::deque<Wgmma>& queue, size_t last) {
    size_t k = last;
    while (k > 0 && !queue[k - 1].done) --k;
    for (; k <= last; ++k) {
      if (!queue[k].done) multiply(queue[k]);
    }
  }

  // Registers of a fragment are about to be read or written by other instructions.
  void use(Fragment fragment) const {
    require(threads[block.current].accumulators.count(fragment) == 0,
            "wgmma.wait_group before the registers of a wgmma are used");
  }

  void some_happen() {
    if (!by_chance()) return;
    for (std::deque<Wgmma>& queue : queues) {
      for (size_t k = queue.size(); k > 0 && !queue[k - 1].done; --k) {
        if (queue[k - 1].issued < kWarpgroup) continue;
        finish_until(queue, k - 1);
        break;
      }
    }
  }

  void finish() const {
    for (const Thread& thread : threads) {
      require(thread.waited == thread.next, "wgmma.wait_group before the block ends");
    }
  }
};

inline TensorCores tensor_cores;
inline const bool tensor_cores_take_part = [] {
  block_starts.push_back([] { tensor_cores.begin(); });
  block_ends.push_back([] { tensor_cores.finish(); });
  return true;
}();

inline void Tma::require_seen(const Wgmma* reader) {
  if (reader == nullptr) return;
  for (const Event& event : reader->waits) {
    require(machine.seen(event), "a barrier between wgmma.wait_group and the next copy");
  }
}

}  // namespace emulation
