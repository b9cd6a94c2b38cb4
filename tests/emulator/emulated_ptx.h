// The functions of csrc/cuda/ptx.cuh on the emulator.
#pragma once

#include <cmath>
#include <cstdint>

#include "coarse.h"
#include "elements.cuh"

namespace fastattn::cuda::ptx {

using emulator::Format;
using emulator::Site;

// --- barriers ------------------------------------------------------------------------------------

template <int Id>
EMULATED void bar_sync(int threads, Site site = Site::here()) {
  emulator::named_barrier(Id, threads, true, site);
}
template <int Id>
EMULATED void bar_arrive(int threads, Site site = Site::here()) {
  emulator::named_barrier(Id, threads, false, site);
}

// --- matrix fragments ----------------------------------------------------------------------------

EMULATED void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  emulator::ldmatrix(r, row, 4, false, site);
}
EMULATED void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  emulator::ldmatrix(r, row, 4, true, site);
}

EMULATED void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16,
                           Site site = Site::here()) {
  const uint32_t b[2] = {b0, b1};
  emulator::mma(d, a, b, Format::kBF16, 16, site);
}
EMULATED void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16,
                           Site site = Site::here()) {
  const uint32_t b[2] = {b0, b1};
  emulator::mma(d, a, b, Format::kFP16, 16, site);
}
EMULATED void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, fp16,
                          Site site = Site::here()) {
  const uint32_t a[2] = {a0, a1};
  emulator::mma(d, a, &b, Format::kFP16, 8, site);
}

// --- asynchronous copies -------------------------------------------------------------------------

EMULATED void cp_async_16(void* shared, const void* global, int bytes, Site site = Site::here()) {
  emulator::cp_async(shared, global, bytes, site);
}
EMULATED void cp_async_commit() { emulator::cp_async_commit(); }
template <int N>
EMULATED void cp_async_wait(Site site = Site::here()) {
  emulator::cp_async_wait(N, site);
}

EMULATED int anew(int x) { return x; }
EMULATED int anew(unsigned x) { return static_cast<int>(x); }

// --- arithmetic ----------------------------------------------------------------------------------

// Operands and results below 2^-126 are flushed to zero, as .ftz has it.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
EMULATED float ex2(float x) { return emulator::approximated(x < -126.0f ? 0.0f : exp2f(x), 2); }
EMULATED float lg2(float x) { return emulator::approximated(log2f(flushed(x)), 1); }
EMULATED float rcp(float x) { return flushed(emulator::approximated(1.0f / flushed(x), 1)); }

EMULATED uint32_t pack(float low, float high, bf16) {
  return emulator::float_to_bf16(low) | uint32_t(emulator::float_to_bf16(high)) << 16;
}
EMULATED uint32_t pack(float low, float high, fp16) {
  return emulator::float_to_fp16(low) | uint32_t(emulator::float_to_fp16(high)) << 16;
}
EMULATED float to_float(fp16 x) { return emulator::fp16_to_float(x.bits); }

}  // namespace fastattn::cuda::ptx
