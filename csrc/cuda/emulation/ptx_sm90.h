// The functions of fused/ptx_sm90.cuh on the CPU; which instructions they are stands there.
#pragma once

#include "wgmma.h"

namespace unitsface::cuda::sm90 {

inline unsigned char* dynamic_shared() {
  return emulation::machine.shared + emulation::block.rank() * emulation::machine.bytes;
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(emulation::machine.offset_of(pointer) % emulation::machine.bytes);
}

inline void asynchronous_events() {
  emulation::tma.some_happen();
  emulation::tensor_cores.some_happen();
}

inline void mbarrier_init(uint64_t* barrier, int count) {
  emulation::barriers.initialize(barrier, count);
}
inline void fence_mbarrier_init() { emulation::barriers.fence_initialization(); }
inline void mbarrier_arrive(uint64_t* barrier) {
  asynchronous_events();
  emulation::barriers.arrive(emulation::machine.offset_of(barrier), 0);
}
inline void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  asynchronous_events();
  emulation::barriers.arrive(emulation::machine.offset_in(barrier, rank), 0);
}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asynchronous_events();
  emulation::barriers.arrive(emulation::machine.offset_of(barrier), bytes);
}
inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  asynchronous_events();
  emulation::barriers.wait(barrier, parity);
}

inline void prefetch_tensor_map(const CUtensorMap*) {}
inline void tma_load(void* target, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asynchronous_events();
  emulation::tma.load(target, map, barrier, x, y, 1u << emulation::block.rank());
}
inline void tma_load_multicast(void* target, const CUtensorMap* map, uint64_t* barrier, int x,
                               int y, unsigned blocks) {
  asynchronous_events();
  emulation::tma.load(target, map, barrier, x, y, blocks);
}
inline void tma_store(const void* source, const CUtensorMap* map, int x, int y) {
  asynchronous_events();
  emulation::tma.store(source, map, x, y);
}
inline void tma_store_commit() { emulation::tma.commit(); }
template <int kLeft>
void tma_store_wait_read() {
  emulation::tma.wait_read(kLeft);
}
inline void fence_proxy_async() { emulation::machine.fence_proxy(); }

inline void warp_sync() {
  asynchronous_events();
  emulation::machine.converge("bar.warp.sync", [] {});
}
inline void named_barrier_sync(int id, int threads) {
  asynchronous_events();
  emulation::barriers.named_sync(id, threads);
}
inline void named_barrier_arrive(int id, int threads) {
  asynchronous_events();
  emulation::barriers.named_arrive(id, threads);
}
inline void cluster_sync() {
  asynchronous_events();
  emulation::barriers.cluster_sync();
}

template <int kRegisters>
void registers_decrease() {
  emulation::barriers.reallocate(kRegisters, false);
}
template <int kRegisters>
void registers_increase() {
  emulation::barriers.reallocate(kRegisters, true);
}

// Four matrices of 8 x 8 elements of 2 bytes; lane l has the address of row l % 8 of matrix l / 8.
inline void store_matrices(void* row, const uint32_t (&words)[4]) {
  static std::map<int, std::array<uint32_t, 128>> warps;
  static std::map<int, std::array<void*, 32>> rows;
  const int me = emulation::block.current, lane = me % 32, warp = me / 32;
  for (int k = 0; k < 4; ++k) warps[warp][k * 32 + lane] = words[k];
  rows[warp][lane] = row;
  emulation::machine.converge("stmatrix", [&] {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) {
        const int owner = matrix * 8 + r;
        const size_t offset = emulation::machine.offset_of(rows[warp][owner]);
        banks |= 1u << offset / 16 % 8;
        const int thread = warp * 32 + owner;
        // The four words of a row come from four neighboring lanes.
        emulation::machine.write(offset, &warps[warp][matrix * 32 + r * 4],
                                 {thread, emulation::machine.clocks[thread][thread]});
      }
      emulation::require(banks == 0xff, "the rows of a stmatrix lie in different banks");
    }
  });
}

inline void wgmma_fence() {
  emulation::tensor_cores.threads[emulation::block.current].fenced = true;
}
inline void wgmma_commit() { emulation::tensor_cores.commit(); }
template <int kLeft>
void wgmma_wait() {
  asynchronous_events();
  emulation::tensor_cores.wait(kLeft);
}
template <bool kHalf>
void wgmma(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  emulation::tensor_cores.issue(a, b, kHalf, add, d);
}
inline void use_registers(float (&d)[16][4]) { emulation::tensor_cores.use(d); }

}  // namespace unitsface::cuda::sm90
