// Every PTX instruction that sm_90a alone has, one small function each, as ptx.cuh has the others:
// mbarriers, copies of boxes of tensors (TMA), products of a warpgroup (wgmma).
//
// A barrier is 8 bytes of shared memory. With FASTATTN_EMULATE the functions come from
// tests/emulator.
#pragma once

#include <cstdint>

#include "elements.cuh"
#include "ptx.cuh"

namespace fastattn::cuda::ptx {

// Which dimension of an operand runs along the rows of its tile: k, or the other one.
enum class Major { kK, kMN };

}  // namespace fastattn::cuda::ptx

#ifdef FASTATTN_EMULATE
#include "emulated_ptx_sm90.h"
#else

#include <cuda.h>

#include "wgmma.cuh"  // csrc/cuda/wgmma.py writes it

namespace fastattn::cuda::ptx {

// --- barriers ------------------------------------------------------------------------------------

// As in ptx.cuh, of a barrier that is known at run time only.
FASTATTN_DEVICE void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTATTN_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A phase ends when `arrivals` have come and all announced bytes have been copied. Threads see the
// barrier behind a __syncthreads, copies behind a fence_proxy_async.
FASTATTN_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
FASTATTN_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and announces `bytes` that copies will bring in this phase.
FASTATTN_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity has ended: the first one has parity 0, and before it a wait for
// parity 1 returns at once.
FASTATTN_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// What this thread wrote to shared memory is seen by copies and products that come after it.
FASTATTN_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- bulk copies ---------------------------------------------------------------------------------

// The box whose first element has these coordinates, innermost first, to shared memory; elements
// outside the tensor become zeros. `barrier` counts the bytes of the whole box.
FASTATTN_DEVICE void tma_load(void* tile, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                              int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(tile)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// From shared memory; what lies outside the tensor isn't stored.
FASTATTN_DEVICE void tma_store(const CUtensorMap* map, const void* tile, int c0, int c1, int c2,
                               int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(tile)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// The same, added to what is there.
FASTATTN_DEVICE void tma_reduce_add(const CUtensorMap* map, const void* tile, int c0, int c1,
                                    int c2, int c3) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group "
      "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(shared_address(tile)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
FASTATTN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the last N groups of this thread's stores are in global memory.
template <int N>
FASTATTN_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
// All but the last N groups have left shared memory.
template <int N>
FASTATTN_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
FASTATTN_DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// --- products of a warpgroup (wgmma itself is in wgmma.cuh) --------------------------------------

// Before the first product, and after a wait before products whose registers were touched.
FASTATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTATTN_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All but the last N committed groups are done: their accumulators may be read.
template <int N>
FASTATTN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Accumulators from here on: the compiler reads none of them before the wait above.
template <int kN>
FASTATTN_DEVICE void settle(float (&d)[kN][4]) {
#pragma unroll
  for (int i = 0; i < kN; i++) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
}

// --- registers -----------------------------------------------------------------------------------

// Of each thread of the warpgroup from now on; more of them only when others have given them up.
template <int N>
FASTATTN_DEVICE void set_max_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
FASTATTN_DEVICE void set_max_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace fastattn::cuda::ptx

#endif
