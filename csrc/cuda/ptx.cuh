// Every PTX instruction the kernels use, one small function each, named after it: kernels contain
// no asm.
//
// With FASTATTN_EMULATE the same functions come from tests/emulator, where the kernels run on a
// CPU. Both halves mean what the PTX ISA says; fragments are laid out as in its section "Matrix
// fragments for mma", with lane = 4·group + t: accumulators and A hold rows group and group + 8, B
// holds column group.
#pragma once

#include <cstdint>

#include "elements.cuh"

#ifdef FASTATTN_EMULATE
#include "emulated_ptx.h"
#else

namespace fastattn::cuda::ptx {

FASTATTN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- barriers
// -------------------------------------------------------------------------------------

// Named barrier Id, 1 … 15 (0 is that of __syncthreads): waits until `threads` threads, whole
// warps, have come, by either function. What they did before is seen behind bar_sync.
template <int Id>
FASTATTN_DEVICE void bar_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}
template <int Id>
FASTATTN_DEVICE void bar_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(Id), "r"(threads) : "memory");
}

// --- matrix fragments
// -----------------------------------------------------------------------------

// Four 8×8 matrices of 16-bit elements from shared memory: lane 8·i + r gives the address of row r
// of matrix i (16 bytes, aligned to 16), and gets elements (group, 2t) and (group, 2t + 1) of each.
FASTATTN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: elements (2t, group) and (2t + 1, group).
FASTATTN_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16, 8) += a (16, 16) · b (16, 8), accumulated in fp32. sm_80.
FASTATTN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FASTATTN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                  fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d (16, 8) += a (16, 8) · b (8, 8). sm_75.
FASTATTN_DEVICE void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// --- asynchronous copies, sm_80
// -------------------------------------------------------------------

// 16 bytes to shared memory, both sides aligned to 16: `bytes` of them from global memory, zeros
// behind. Nothing is read where bytes is 0.
FASTATTN_DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
FASTATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last N committed groups of this thread are there.
template <int N>
FASTATTN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// x, from here on: what is computed from it is computed again rather than kept in registers from
// before a loop.
FASTATTN_DEVICE int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
FASTATTN_DEVICE int anew(unsigned x) { return anew(static_cast<int>(x)); }

// --- arithmetic
// -----------------------------------------------------------------------------------

// 2^x within 2 ulp, denormal results flushed; 2^-inf = 0, NaN stays NaN.
FASTATTN_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x) within 1 ulp beyond [0.5, 2], absolute error 2^-22 inside.
FASTATTN_DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1/x within 1 ulp, denormals flushed.
FASTATTN_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even, `low` in the lower half. sm_75 has no such instruction for
// bf16: there the bits are rounded.
FASTATTN_DEVICE uint32_t pack(float low, float high, bf16) {
#if __CUDA_ARCH__ >= 800
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  const auto rounded = [](float x) {
    const uint32_t bits = __float_as_uint(x);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
  };
  return rounded(low) | rounded(high) << 16;
#endif
}
FASTATTN_DEVICE uint32_t pack(float low, float high, fp16) {
  uint32_t r;
  asm("{\n.reg .b16 l, h;\ncvt.rn.f16.f32 l, %1;\ncvt.rn.f16.f32 h, %2;\nmov.b32 %0, {l, h};\n}"
      : "=r"(r)
      : "f"(low), "f"(high));
  return r;
}
FASTATTN_DEVICE float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

}  // namespace fastattn::cuda::ptx

#endif
