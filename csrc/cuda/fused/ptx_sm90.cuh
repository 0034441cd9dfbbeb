// Instructions of Hopper (sm_90a) that CUDA C++ has no function for. Each names the section of the
// PTX ISA (version 8.0 and later) that it follows; csrc/cuda/emulation/ptx_sm90.h has the same
// functions for the CPU, with the rules of these sections.
#pragma once

#include <cuda.h>

#include "../common.cuh"

#if defined(UF_EMULATED)
#include "../emulation/ptx_sm90.h"
#else

namespace unitsface::cuda::sm90 {

// "Shared State Space", dynamic size: aligned as the 128-byte swizzle repeats.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// "mbarrier.init"
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// "membar / fence": fence.mbarrier_init makes initialized mbarriers visible to copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// "mbarrier.arrive"
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// "mapa", "mbarrier.arrive": at the mbarrier in the same place of block `rank` of the cluster. What
// this thread wrote is released to its own block alone: the scope of a cluster would take a fence
// of the whole device.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// "mbarrier.arrive" with .expect_tx
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// "mbarrier.test_wait / mbarrier.try_wait": until the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// "prefetch": of a tensor map in the constant bank of the kernel's parameters.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// "cp.async.bulk.tensor": a box whose first element is column x of row y; outside it reads 0.
__device__ __forceinline__ void tma_load(void* target, const CUtensorMap* map, uint64_t* barrier,
                                         int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(target)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}

// "cp.async.bulk.tensor" with .multicast::cluster: the same to each block of the cluster whose bit
// is set, at the place and with the mbarrier that `target` and `barrier` are in this one.
__device__ __forceinline__ void tma_load_multicast(void* target, const CUtensorMap* map,
                                                   uint64_t* barrier, int x, int y,
                                                   unsigned blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(target)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// "cp.async.bulk.tensor": what lies outside the tensor is not written.
__device__ __forceinline__ void tma_store(const void* source, const CUtensorMap* map, int x,
                                          int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(x), "r"(y), "r"(shared_address(source))
      : "memory");
}

// "cp.async.bulk.commit_group"
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// "cp.async.bulk.wait_group": all but the last kLeft groups of this thread have read their sources.
template <int kLeft>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}

// "membar / fence": what this thread wrote to shared memory, for copies and wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// "bar.warp.sync"
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// "bar / barrier": .sync waits, .arrive does not.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "barrier.cluster": all threads of the cluster wait for each other, of the block if it has none.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// "setmaxnreg"
template <int kRegisters>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// "stmatrix": four matrices of 8 x 8 elements of 2 bytes; lane l has the address of row l % 8 of
// matrix l / 8, and of each matrix columns 2 (l % 4) + {0, 1} of row l / 4.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

// "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Keeps the compiler from moving accesses to these registers across this point.
__device__ __forceinline__ void use_registers(float (&d)[16][4]) {
#pragma unroll
  for (int c = 0; c < 16; ++c) {
#pragma unroll
    for (int k = 0; k < 4; ++k) asm volatile("" : "+f"(d[c][k])::"memory");
  }
}

// "wgmma.mma_async": 64 x 128 += 64 x 16 times 16 x 128 of operands in shared memory, both with the
// depth innermost; without `add` the accumulator counts as 0.
#define UF_FOUR(c) "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
#define UF_WGMMA(types)                                                                         \
  asm volatile(                                                                                 \
      "{\n"                                                                                     \
      ".reg .pred add;\n"                                                                       \
      "setp.ne.b32 add, %66, 0;\n"                                                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                      \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "   \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "   \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, add, 1, 1, 0, 0;\n"    \
      "}"                                                                                       \
      : UF_FOUR(0), UF_FOUR(1), UF_FOUR(2), UF_FOUR(3), UF_FOUR(4), UF_FOUR(5), UF_FOUR(6),     \
        UF_FOUR(7), UF_FOUR(8), UF_FOUR(9), UF_FOUR(10), UF_FOUR(11), UF_FOUR(12), UF_FOUR(13), \
        UF_FOUR(14), UF_FOUR(15)                                                                \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
template <bool kHalf>
__device__ __forceinline__ void wgmma(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  if constexpr (kHalf) {
    UF_WGMMA("f16.f16");
  } else {
    UF_WGMMA("bf16.bf16");
  }
}
#undef UF_WGMMA
#undef UF_FOUR

}  // namespace unitsface::cuda::sm90

#endif

namespace unitsface::cuda::sm90 {

// "Matrix Descriptor Format" of wgmma: rows of 128 bytes with the 128-byte swizzle, groups of eight
// rows `stride` bytes apart; the leading byte offset is not used.
__device__ __forceinline__ uint64_t descriptor(const void* start, uint64_t stride) {
  return static_cast<uint64_t>((shared_address(start) & 0x3ffff) >> 4) | uint64_t(1) << 16 |
         stride >> 4 << 32 | uint64_t(1) << 62;
}

}  // namespace unitsface::cuda::sm90
