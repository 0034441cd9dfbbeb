// Bulk copies of boxes of a two-dimensional tensor between global and shared memory, with the
// 128-byte swizzle: piece p of 16 bytes of row r lies in place p ^ (r mod 8) of its 128 bytes. To
// each block of a cluster a copy lands at a moment of its own.
#pragma once

#include <cuda.h>

#include "barriers.h"

namespace emulation {

// What the emulation keeps in a CUtensorMap.
struct Box {
  unsigned char* base;
  uint64_t columns, rows, stride;  // stride in bytes
  uint32_t box_columns, box_rows;
  uint32_t element;  // bytes
  uint32_t swizzled;

  size_t bytes() const { return static_cast<size_t>(box_columns) * element * box_rows; }
};
static_assert(sizeof(Box) <= sizeof(CUtensorMap), "a box fits into a tensor map");

inline Box box_of(const CUtensorMap* map) {
  Box box;
  std::memcpy(&box, map, sizeof(box));
  return box;
}

// The rules of cuTensorMapEncodeTiled, as far as they concern two dimensions of 16-bit elements.
inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                             void* address, const cuuint64_t* dims, const cuuint64_t* strides,
                             const cuuint32_t* box_dims, const cuuint32_t* element_strides,
                             CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool half =
      type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const bool valid = half && rank == 2 && reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
                     dims[0] > 0 && dims[1] > 0 && dims[0] < (1ull << 32) &&
                     dims[1] < (1ull << 32) && strides[0] % 16 == 0 && strides[0] < (1ull << 40) &&
                     box_dims[0] <= 256 && box_dims[1] <= 256 && box_dims[0] > 0 &&
                     box_dims[1] > 0 && element_strides[0] == 1 && element_strides[1] == 1 &&
                     interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && box_dims[0] * 2 % 16 == 0 &&
                     (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ||
                      (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box_dims[0] * 2 <= 128));
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  const Box box = {static_cast<unsigned char*>(address),
                   dims[0],
                   dims[1],
                   strides[0],
                   box_dims[0],
                   box_dims[1],
                   2,
                   swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &box, sizeof(box));
  return CUDA_SUCCESS;
}

struct Copy {
  Box box;
  size_t offset;  // in the shared memory of the cluster
  int32_t x, y;
  Mbarrier* barrier;  // of a load
  int thread;         // of a store
  int64_t group;      // of a store; -1: not committed
  bool read = false;
};

struct Tma {
  std::vector<Copy> loads;
  std::deque<Copy> stores;
  std::vector<int64_t> groups;  // committed by each thread

  void begin() {
    loads.clear();
    stores.clear();
    groups.assign(machine.threads, 0);
  }

  // Offset in shared memory of a piece of 16 bytes.
  static size_t place(const Box& box, size_t offset, uint32_t row, uint32_t piece) {
    const size_t plain =
        offset + static_cast<size_t>(row) * box.box_columns * box.element + 16 * piece;
    // The pattern is one of addresses.
    return box.swizzled ? plain ^ ((plain >> 7 & 7) << 4) : plain;
  }

  // For each piece of a box: (its bytes in shared memory, in global memory, elements inside).
  template <class Each>
  static void pieces(const Copy& copy, const Each& each) {
    const Box& box = copy.box;
    const int64_t per_piece = 16 / box.element;
    for (uint32_t row = 0; row < box.box_rows; ++row) {
      for (uint32_t piece = 0; piece < box.box_columns / per_piece; ++piece) {
        const int64_t x = copy.x + piece * per_piece, y = static_cast<int64_t>(copy.y) + row;
        int64_t inside = std::min(per_piece, static_cast<int64_t>(box.columns) - x);
        if (y < 0 || y >= static_cast<int64_t>(box.rows) || x < 0) inside = 0;
        each(place(box, copy.offset, row, piece), row, piece,
             inside > 0 ? box.base + y * static_cast<int64_t>(box.stride) + x * box.element
                        : nullptr,
             static_cast<size_t>(std::max<int64_t>(inside, 0)) * box.element);
      }
    }
  }

  static void check(const Copy& copy) {
    require(copy.offset % (copy.box.swizzled ? 1024 : 128) == 0,
            "a box with the 128-byte swizzle is aligned to 1024 bytes");
    require(copy.offset % machine.bytes + copy.box.bytes() <= machine.bytes,
            "a box lies in shared memory");
  }

  // To the blocks of the cluster whose bits are set.
  void load(void* target, const CUtensorMap* map, const void* mbarrier, int32_t x, int32_t y,
            unsigned blocks) {
    require(blocks != 0 && blocks >> block.cluster == 0,
            "a multicast goes to blocks of the cluster");
    for (int rank = 0; rank < block.cluster; ++rank) {
      if ((blocks >> rank & 1) == 0) continue;
      Mbarrier& barrier = barriers.at(machine.offset_in(mbarrier, rank));
      load({box_of(map), machine.offset_in(target, rank), x, y, &barrier, block.current, -1});
    }
  }

  void load(const Copy& copy) {
    Mbarrier& barrier = *copy.barrier;
    require(barrier.fenced, "fence.mbarrier_init before the asynchronous proxy uses an mbarrier");
    check(copy);
    barrier.issued += static_cast<int64_t>(copy.box.bytes());
    const bool own = machine.block_of(copy.offset) == block.rank();
    // The ISA also allows expect-tx after the copy; these kernels announce their own before.
    require(barrier.issued <= barrier.announced || (!own && barrier.pending > 0),
            own ? "mbarrier.expect_tx announces the bytes of every copy of its phase"
                : Barriers::kCountedElsewhere);
    pieces(copy, [&](size_t offset, uint32_t row, uint32_t piece, unsigned char*, size_t) {
      Grain& grain = machine.grains[offset / kGrain];
      require(grain.landing == 0, "a copy does not write what another one is writing");
      require(grain.reading == 0, own ? "a copy does not overwrite what is still being read"
                                      : "a copy does not overwrite what another block still reads");
      for (const Wgmma* reader : grain.readers) require_seen(reader);
      require(grain.tensor == nullptr ||
                  machine.clocks[block.current][machine.threads + grain.barrier] > grain.phase,
              "a copy does not overwrite one without a wait between them");
      grain.landing = 1;
      grain.tensor = copy.box.base;
      grain.row = int64_t{copy.y} + row;
      grain.piece = int64_t{copy.x} * copy.box.element / 16 + piece;
      grain.barrier = barrier.index;
      grain.phase = barrier.phase;
      std::memset(machine.shared + offset, 0xff, kGrain);
    });
    loads.push_back(copy);
    ++block.progress;
  }

  static void require_seen(const Wgmma* reader);  // wgmma.h

  bool land() {
    if (loads.empty()) return false;
    const size_t which = any_of(loads.size());
    const Copy copy = loads[which];
    loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(which));
    pieces(copy, [&](size_t offset, uint32_t, uint32_t, const unsigned char* source, size_t n) {
      std::memset(machine.shared + offset, 0, kGrain);
      if (n > 0) std::memcpy(machine.shared + offset, source, n);
      machine.grains[offset / kGrain].landing = 0;
    });
    copy.barrier->complete_transactions(static_cast<int64_t>(copy.box.bytes()));
    ++block.progress;
    return true;
  }

  void store(const void* source, const CUtensorMap* map, int32_t x, int32_t y) {
    Copy copy = {box_of(map), machine.offset_of(source), x, y, nullptr, block.current, -1};
    check(copy);
    pieces(copy, [&](size_t offset, uint32_t, uint32_t, unsigned char*, size_t) {
      Grain& grain = machine.grains[offset / kGrain];
      require(grain.written.thread >= 0, "a bulk store reads what threads have written");
      require(grain.fenced.thread >= 0,
              "fence.proxy.async between the writes of threads and a bulk store that reads them");
      require(machine.seen(grain.fenced), "a barrier between fence.proxy.async and a bulk store");
      ++grain.reading;
    });
    stores.push_back(copy);
  }
  void commit() {
    for (Copy& copy : stores) {
      if (copy.thread == block.current && copy.group < 0) copy.group = groups[block.current];
    }
    ++groups[block.current];
  }
  void read(Copy& copy) {
    if (copy.read) return;
    copy.read = true;
    pieces(copy, [&](size_t offset, uint32_t, uint32_t, unsigned char* target, size_t n) {
      if (n > 0) std::memcpy(target, machine.shared + offset, n);
    });
  }
  void wait_read(int64_t left) {
    const int64_t done = groups[block.current] - left;
    for (auto copy = stores.begin(); copy != stores.end();) {
      if (copy->thread != block.current || copy->group < 0 || copy->group >= done) {
        ++copy;
        continue;
      }
      read(*copy);
      pieces(*copy, [&](size_t offset, uint32_t, uint32_t, unsigned char*, size_t) {
        Grain& grain = machine.grains[offset / kGrain];
        --grain.reading;
        grain.store_read = machine.now();
      });
      copy = stores.erase(copy);
    }
  }
  // Something that may happen at any time.
  void some_happen() {
    if (by_chance()) land();
    if (!stores.empty() && by_chance()) read(stores[any_of(stores.size())]);
  }
  void end_thread() const {
    if (machine.running[block.rank()] > 0) return;
    for (const Copy& copy : loads) {
      require(machine.block_of(copy.offset) != block.rank(),
              "copies into shared memory have landed before the block ends");
    }
  }
  void finish() const { require(stores.empty(), "cp.async.bulk.wait_group before the block ends"); }
};

inline Tma tma;
inline const bool tma_takes_part = [] {
  block_starts.push_back([] { tma.begin(); });
  block_idles.push_back([] { return tma.land(); });
  thread_ends.push_back([] { tma.end_thread(); });
  block_ends.push_back([] { tma.finish(); });
  return true;
}();

// The library's part of it.
inline cudaError_t driver_entry_point(const char* symbol, void** function, unsigned,
                                      unsigned long long, cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// Few, so that a block has several tiles.
constexpr int kMultiprocessors = 3;

}  // namespace emulation

#define cudaGetDevice(device) (*(device) = 0, cudaSuccess)
#define cudaDeviceGetAttribute(value, ...) (*(value) = emulation::kMultiprocessors, cudaSuccess)
#define cudaGetDriverEntryPointByVersion emulation::driver_entry_point
#define cudaFuncSetAttribute(...) cudaSuccess
