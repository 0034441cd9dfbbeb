// Cosines of tiles with the instructions of sm_90a, by blocks that stay on their multiprocessor.
//
// A block takes a range of tiles, row by row. The rows of the current tiles stay in shared memory;
// one thread has columns copied into a ring of stages. Two warpgroups take tiles in turn: while one
// multiplies, the other works on its products. The depth is cut into chunks of 128 bytes, which
// have the 128-byte swizzle everywhere.
//
// Rows of more chunks than shared memory holds are not resident: they pass through the ring with
// the columns.
//
// Blocks may be clusters of peers that pass through the same columns with different rows. Each
// copies its share of every chunk of columns to all of them.
#pragma once

#include <type_traits>

#include "accumulator.cuh"
#include "operands.h"
#include "ptx_sm90.cuh"

namespace unitsface::cuda::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kWarpgroupWarps = kWarpgroup / kLanes;
constexpr int kConsumers = 2;
constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kChunk = 64;      // elements of the depth
constexpr int kMostChunks = 8;  // of resident rows
constexpr int kMostPeers = 2;   // blocks of a cluster
constexpr int kChunkBytes = kTileRows * kChunk * 2;
static_assert(kTileRows == kTileColumns, "chunks of rows and of columns are alike");

// Registers per thread: launched with 168, of which the copying warpgroup gives most away.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

// The threads of a consumer wait for each other at a named barrier of their own.
struct ConsumerBarrier {
  static constexpr int kFirst = 3;

  int consumer;

  __device__ __forceinline__ void operator()() const {
    named_barrier_sync(kFirst + consumer, kWarpgroup);
  }
};

// A tile's rows are two halves of 64, of each of which a warp has a strip of 16.
using ConsumerTeam = Team<2, 16, kWarpgroupWarps, 1, 64, ConsumerBarrier>;
using Products = ConsumerTeam::Values;

// A number that is the same in all lanes of a warp, made so for the compiler.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

__device__ __forceinline__ ConsumerTeam team_of(int consumer) {
  return {static_cast<int>(threadIdx.x) % kWarpgroup, {consumer}};
}

// Tensors of a launch, as copies see them: boxes are chunks of operands, and strips of gradients.
struct TensorMaps {
  CUtensorMap a, b, gradient;
};

// Slabs of 16 rows and 64 columns of a gradient on its way to memory.
constexpr int kSlabRows = 16, kSlabColumns = 64;
constexpr int kSlabBytes = kSlabRows * kSlabColumns * 2;

// Shared memory: chunks, kWarpSlabs slabs for each warp, mbarriers. Chunks are those of the rows
// and kStages of columns, or, of rows that pass, all a ring of stages of two: rows before columns.
template <int kStages_, int kWarpSlabs_>
struct Memory {
  static constexpr int kWarpSlabs = kWarpSlabs_;
  static constexpr int kPassingStages = (kMostChunks + kStages_) / 2;
  static constexpr int kSlabs = (kMostChunks + kStages_) * kChunkBytes;
  static constexpr int kBarriers = kSlabs + kConsumers * kWarpgroupWarps * kWarpSlabs * kSlabBytes;
  static constexpr int kBytes = kBarriers + (2 * kMostChunks + 2 * kPassingStages) * 8;
  static_assert(kStages_ <= kPassingStages, "barriers for both rings");
  static_assert(kBytes <= 232448, "227 KB");

  unsigned char* base;

  static __device__ __forceinline__ int stages(bool resident) {
    return resident ? kStages_ : kPassingStages;
  }
  // `place`: the chunk of resident rows, or the stage.
  __device__ __forceinline__ unsigned char* rows(int place) const {
    return base + place * kChunkBytes;
  }
  __device__ __forceinline__ unsigned char* columns(int stage, bool resident) const {
    return base + ((resident ? kMostChunks : kPassingStages) + stage) * kChunkBytes;
  }
  __device__ __forceinline__ unsigned char* slabs(int warp) const {
    return base + kSlabs + warp * kWarpSlabs * kSlabBytes;
  }
  __device__ __forceinline__ unsigned char* end() const { return base + kBytes; }
  __device__ __forceinline__ uint64_t* barriers() const {
    return reinterpret_cast<uint64_t*>(base + kBarriers);
  }
  __device__ __forceinline__ uint64_t* rows_full(int chunk) const { return barriers() + chunk; }
  __device__ __forceinline__ uint64_t* rows_empty(int chunk) const {
    return barriers() + kMostChunks + chunk;
  }
  __device__ __forceinline__ uint64_t* full(int stage) const {
    return barriers() + 2 * kMostChunks + stage;
  }
  __device__ __forceinline__ uint64_t* empty(int stage) const {
    return full(kPassingStages) + stage;
  }
};

// Tiles of a block: those from `first` to `last` - 1 of groups of `peers` row tiles times column
// tiles, counted group by group, and of a group the row tile of its rank.
struct Range {
  int column_tiles, first, last;
  int peers, rank;

  __device__ __forceinline__ int row_tile(int group) const { return group * peers + rank; }
};

// Position in a range.
struct Place {
  int group, column_tile;  // group of row tiles

  __device__ __forceinline__ explicit Place(const Range& range, int skipped)
      : group(range.first / range.column_tiles), column_tile(range.first % range.column_tiles) {
    skip(range, skipped);
  }
  __device__ __forceinline__ void skip(const Range& range, int tiles) {
    column_tile += tiles;
    while (column_tile >= range.column_tiles) {
      column_tile -= range.column_tiles;
      ++group;
    }
  }
};

// Where the next chunk of columns is in the ring of stages, and the parity of its round.
struct Slot {
  int stages;
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ explicit Slot(int count) : stages(count) {}
  __device__ __forceinline__ void next() {
    const bool round = ++stage == stages;
    stage = round ? 0 : stage;
    parity ^= round;
  }
  __device__ __forceinline__ void skip(int chunks) {
    stage += chunks;
    while (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

// Set up by the whole cluster before its threads part.
template <class Memory>
__device__ __forceinline__ void initialize(const Memory& memory, int peers) {
  if (threadIdx.x == 0) {
    for (int chunk = 0; chunk < kMostChunks; ++chunk) {
      mbarrier_init(memory.rows_full(chunk), 1);
      mbarrier_init(memory.rows_empty(chunk), kConsumers * kWarpgroupWarps);
    }
    for (int stage = 0; stage < Memory::kPassingStages; ++stage) {
      mbarrier_init(memory.full(stage), 1);
      mbarrier_init(memory.empty(stage),
                    kWarpgroupWarps * (planted(71) || planted(79) ? 1 : peers));
    }
    if (!planted(1)) fence_mbarrier_init();
  }
  if (planted(72)) named_barrier_sync(0, kBlockThreads);
  if (!planted(2) && !planted(72)) cluster_sync();
}

// One thread: copies all chunks of the range's tiles.
template <bool kResident, class Memory>
__device__ __forceinline__ void produce(const TensorMaps& maps, const Memory& memory,
                                        const Range& range, int chunks) {
  prefetch_tensor_map(&maps.a);
  prefetch_tensor_map(&maps.b);
  Place place(range, 0);
  Slot slot(Memory::stages(kResident));
  unsigned parity = 1;  // of the last round of rows
  // This block's share of a chunk of columns: boxes of maps.b have as many.
  const int share = range.peers == 1 || planted(73) ? 0 : range.rank * (kTileColumns / kMostPeers);
#pragma unroll 1
  for (int t = range.first; t < range.last; ++t) {
    const bool fresh = kResident && (t == range.first || place.column_tile == 0);
    parity ^= fresh;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk, slot.next()) {
      if (fresh) {
        if (!planted(3)) mbarrier_wait(memory.rows_empty(chunk), parity ^ 1);
        mbarrier_arrive_expect(memory.rows_full(chunk), kChunkBytes);
        tma_load(memory.rows(chunk), &maps.a, memory.rows_full(chunk), chunk * kChunk,
                 range.row_tile(place.group) * kTileRows);
      }
      uint64_t* full = memory.full(slot.stage);
      if (!planted(4)) {
        mbarrier_wait(memory.empty(slot.stage), slot.parity ^ (planted(5) ? 0 : 1));
      }
      // Of the shares of all peers, which may already be under way.
      constexpr int kBytes = kResident ? kChunkBytes : 2 * kChunkBytes;
      mbarrier_arrive_expect(full, planted(6)    ? 2 * kBytes
                                   : planted(7)  ? kBytes / 2 / range.peers
                                   : planted(75) ? kBytes / range.peers
                                                 : kBytes);
      if (!kResident) {
        tma_load(memory.rows(planted(81) ? chunk % kMostChunks : slot.stage), &maps.a, full,
                 chunk * kChunk, range.row_tile(place.group) * kTileRows);
      }
      unsigned char* target =
          memory.columns(planted(8) ? 0 : slot.stage, kResident) + share * kChunk * 2;
      const int column = place.column_tile * kTileColumns + share;
      if (range.peers == 1) {
        tma_load(target, &maps.b, full, chunk * kChunk, column);
      } else {
        tma_load_multicast(target, &maps.b, full, chunk * kChunk, column,
                           planted(74) ? 1u << range.rank : (1u << kMostPeers) - 1);
      }
    }
    place.skip(range, 1);
  }
}

// A warp's arrival.
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  if (threadIdx.x % kLanes == 0) mbarrier_arrive(barrier);
}

// The same at the barriers of all peers.
__device__ __forceinline__ void arrive(uint64_t* barrier, int peers) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  if (planted(79)) return arrive(barrier);
  if (lane < (planted(76) ? 1 : peers)) mbarrier_arrive_at(barrier, planted(77) ? 0 : lane);
}

// Products of a tile, begun: afterwards they are under way. Returns the stage that the last of them
// read. `segment` counts resident rows, which are released after their last use.
template <bool kHalf, bool kResident, class Memory>
__device__ __forceinline__ int multiply(Products& products, const Memory& memory, Slot& slot,
                                        unsigned segment, bool last, int chunks, int peers) {
  int before = 0;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = slot.stage;
    if (kResident && !planted(9)) mbarrier_wait(memory.rows_full(chunk), segment & 1);
    if (!planted(10)) mbarrier_wait(memory.full(stage), slot.parity ^ (planted(11) ? 1 : 0));
    const uint64_t stride = planted(12) ? 512 : 1024;
    const uint64_t a = descriptor(memory.rows(kResident ? chunk : stage), stride);
    const uint64_t b =
        descriptor(memory.columns(stage, kResident), stride) ^ (planted(13) ? 3ull << 62 : 0);
    if (!planted(14)) wgmma_fence();
#pragma unroll
    for (int step = 0; step < kChunk / 16; ++step) {
      // 16 elements on are 2 units of 16 bytes.
      const int on = planted(15) ? 4 * step : 2 * step;
      wgmma<kHalf>(products.value[0], a + on, b + on, chunk > 0 || step > 0);
      wgmma<kHalf>(products.value[1], a + on + (kChunkBytes / 2 >> 4), b + on,
                   chunk > 0 || step > 0);
    }
    wgmma_commit();
    slot.next();
    if (chunk > 0) {
      if (!planted(16)) wgmma_wait<1>();
      arrive(memory.empty(planted(26) ? stage : before), peers);
      if (kResident && last) arrive(memory.rows_empty(chunk - 1));
    }
    before = stage;
  }
  return before;
}

// A consumer's tiles. All threads of the warpgroup call work.prepare(tile), while the products are
// under way, and work(tile, products). `half`: the operands are float16, not bfloat16.
template <class Memory, class Work>
__device__ __forceinline__ void consume(const Memory& memory, const Range& range,
                                        const TileOrder& order, int chunks, bool half, int consumer,
                                        Work& work) {
  constexpr int kTurn = 1;  // named barriers kTurn + consumer: the consumer may multiply
  if (consumer == 1 && range.first < range.last) {
    named_barrier_arrive(kTurn, kConsumers * kWarpgroup);
  }
  Place place(range, consumer);
  const int first_group = range.first / range.column_tiles;
  const bool resident = chunks <= kMostChunks;
  Slot slot(Memory::stages(resident));
  slot.skip(consumer * chunks);
  unsigned released = 0;  // segments of rows
#pragma unroll 1
  for (int t = range.first + consumer; t < range.last; t += kConsumers) {
    const unsigned segment = static_cast<unsigned>(place.group - first_group);
    for (; resident && released < segment; ++released) {
      // Rows of which this consumer has no tile.
      for (int chunk = 0; chunk < chunks; ++chunk) {
        mbarrier_wait(memory.rows_full(chunk), released & 1);
        // All lanes are past this phase before the next one may begin.
        if (!planted(82)) warp_sync();
        arrive(memory.rows_empty(chunk));
      }
    }
    const bool last = resident && place.column_tile + kConsumers >= range.column_tiles;
    if (planted(80) && range.row_tile(place.group) >= order.row_tiles) return;
    Products products;
    named_barrier_sync(kTurn + consumer, planted(17) ? kWarpgroup : kConsumers * kWarpgroup);
    const auto begin = [&](auto is_half, auto is_resident) {
      return multiply<is_half.value, is_resident.value>(products, memory, slot, segment, last,
                                                        chunks, range.peers);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    const int stage = resident ? (half ? begin(Yes(), Yes()) : begin(No(), Yes()))
                               : (half ? begin(Yes(), No()) : begin(No(), No()));
    if (t + 1 < range.last && !planted(18)) {
      named_barrier_arrive(kTurn + 1 - consumer, kConsumers * kWarpgroup);
    }
    const Tile tile = order.of(range.row_tile(place.group), place.column_tile);
    const bool inside = tile.rows > 0;  // the last group may lack rows for some peers
    if (inside) work.prepare(tile);
    if (!planted(19)) wgmma_wait<0>();
    use_registers(products.value[0]);
    use_registers(products.value[1]);
    arrive(memory.empty(stage), range.peers);
    if (last) {
      arrive(memory.rows_empty(chunks - 1));
      ++released;
    }
    slot.skip(chunks);  // of the other consumer
    if (inside) work(tile, products);
    place.skip(range, kConsumers);
  }
}

// What a block does: a thread copies, and two warpgroups are consumers. `work(consumer)` is called
// by all threads of each of them.
template <class Memory, class Work>
__device__ __forceinline__ void run_block(const TensorMaps& maps, const Memory& memory,
                                          const Range& range, int chunks, const Work& work) {
  initialize(memory, range.peers);
  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / kWarpgroup);
  if (warpgroup == 0) {
    registers_decrease<kProducerRegisters>();
    if (threadIdx.x == 0) {
      if (chunks <= kMostChunks) {
        produce<true>(maps, memory, range, chunks);
      } else {
        produce<false>(maps, memory, range, chunks);
      }
    }
  } else {
    if (planted(27)) {
      registers_increase<kConsumerRegisters + 8>();
    } else {
      registers_increase<kConsumerRegisters>();
    }
    work(warpgroup - 1);
  }
  // No block ends while peers arrive at its barriers.
  if (!planted(78)) cluster_sync();
}

}  // namespace unitsface::cuda::sm90
