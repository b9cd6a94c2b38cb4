// CUDA's names for a kernel that g++ compiles: qualifiers, built-in variables, vector types, warp
// functions and the part of the math library that kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bits.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define FASTATTN_SHARED(name) unsigned char* const name = emulator::shared_memory()

#define threadIdx (emulator::ids().thread)
#define blockIdx (emulator::ids().block)
#define blockDim (emulator::ids().block_dim)
#define gridDim (emulator::ids().grid_dim)
constexpr int warpSize = 32;

#define EMULATED inline __attribute__((always_inline, unused))

// --- vector types --------------------------------------------------------------------------------

#define EMULATED_VECTORS(type, name)                                                     \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                               \
  struct name##3 { type x, y, z; };                                                      \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  EMULATED name##2 make_##name##2(type x, type y) { return {x, y}; }                     \
  EMULATED name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }          \
  EMULATED name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(unsigned short, ushort)
EMULATED_VECTORS(unsigned char, uchar)
EMULATED_VECTORS(double, double)
#undef EMULATED_VECTORS

// --- synchronisation -----------------------------------------------------------------------------

using emulator_site = emulator::Site;

EMULATED void __syncthreads(emulator_site site = emulator_site::here()) {
  emulator::sync_threads(site);
}
EMULATED void __syncwarp(unsigned mask = 0xffffffffu, emulator_site site = emulator_site::here()) {
  emulator::sync_warp(mask, site);
}
EMULATED void __threadfence(emulator_site site = emulator_site::here()) {
  emulator::thread_fence(site);
}
EMULATED void __threadfence_block(emulator_site site = emulator_site::here()) {
  emulator::thread_fence(site);
}
EMULATED void __nanosleep(unsigned) { emulator::yield(); }

// --- warp functions ------------------------------------------------------------------------------

namespace emulator {
// Values of 4 or 8 bytes.
template <class T>
EMULATED T shuffle_value(Shuffle kind, uint32_t mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint32_t words[sizeof(T) / 4];
  __builtin_memcpy(words, &value, sizeof value);
  for (uint32_t& word : words) word = shuffle(kind, mask, word, operand, width, site);
  __builtin_memcpy(&value, words, sizeof value);
  return value;
}
}  // namespace emulator

template <class T>
EMULATED T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
                       emulator_site site = emulator_site::here()) {
  return emulator::shuffle_value(emulator::Shuffle::kIndex, mask, value, lane, width, site);
}
template <class T>
EMULATED T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          emulator_site site = emulator_site::here()) {
  return emulator::shuffle_value(emulator::Shuffle::kUp, mask, value, int(delta), width, site);
}
template <class T>
EMULATED T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                            emulator_site site = emulator_site::here()) {
  return emulator::shuffle_value(emulator::Shuffle::kDown, mask, value, int(delta), width, site);
}
template <class T>
EMULATED T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                           emulator_site site = emulator_site::here()) {
  return emulator::shuffle_value(emulator::Shuffle::kXor, mask, value, lanes, width, site);
}
EMULATED unsigned __ballot_sync(unsigned mask, int predicate,
                                emulator_site site = emulator_site::here()) {
  return emulator::ballot(mask, predicate != 0, site);
}
EMULATED int __any_sync(unsigned mask, int predicate, emulator_site site = emulator_site::here()) {
  return emulator::ballot(mask, predicate != 0, site) != 0;
}
EMULATED int __all_sync(unsigned mask, int predicate, emulator_site site = emulator_site::here()) {
  return emulator::ballot(mask, predicate != 0, site) == 0xffffffffu;
}

// --- memory --------------------------------------------------------------------------------------

template <class T>
EMULATED T __ldg(const T* p) {
  return *p;
}
template <class T>
EMULATED T __ldcs(const T* p) {
  return *p;
}
template <class T>
EMULATED void __stcs(T* p, T x) {
  *p = x;
}

template <class T>
EMULATED T atomicAdd(T* p, T x, emulator_site site = emulator_site::here()) {
  return emulator::atomic_add(p, x, site);
}
template <class T>
EMULATED T atomicMax(T* p, T x, emulator_site site = emulator_site::here()) {
  return emulator::atomic_max(p, x, site);
}
EMULATED unsigned atomicExch(unsigned* p, unsigned x, emulator_site site = emulator_site::here()) {
  return emulator::atomic_exchange(p, x, site);
}
EMULATED int atomicExch(int* p, int x, emulator_site site = emulator_site::here()) {
  return int(emulator::atomic_exchange(reinterpret_cast<uint32_t*>(p), uint32_t(x), site));
}
EMULATED unsigned atomicCAS(unsigned* p, unsigned expected, unsigned x,
                            emulator_site site = emulator_site::here()) {
  return emulator::atomic_compare_exchange(p, expected, x, site);
}
EMULATED int atomicCAS(int* p, int expected, int x, emulator_site site = emulator_site::here()) {
  return int(emulator::atomic_compare_exchange(reinterpret_cast<uint32_t*>(p), uint32_t(expected),
                                               uint32_t(x), site));
}

// --- arithmetic ----------------------------------------------------------------------------------

EMULATED unsigned __float_as_uint(float x) { return emulator::float_bits(x); }
EMULATED int __float_as_int(float x) { return int(emulator::float_bits(x)); }
EMULATED float __uint_as_float(unsigned x) { return emulator::bit_float(x); }
EMULATED float __int_as_float(int x) { return emulator::bit_float(unsigned(x)); }
EMULATED unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
EMULATED int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATED int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
EMULATED int __ffs(int x) { return __builtin_ffs(x); }

EMULATED float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
EMULATED float __expf(float x) { return std::exp(x); }
EMULATED float __logf(float x) { return std::log(x); }
EMULATED float __log2f(float x) { return std::log2(x); }
EMULATED float __fdividef(float a, float b) { return a / b; }
EMULATED float __frcp_rn(float x) { return 1.0f / x; }
EMULATED float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
EMULATED float __fmul_rn(float a, float b) { return a * b; }
EMULATED float __fadd_rn(float a, float b) { return a + b; }
EMULATED float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

#define EMULATED_MIN_MAX(type)                                          \
  EMULATED constexpr type min(type a, type b) { return b < a ? b : a; } \
  EMULATED constexpr type max(type a, type b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(unsigned long long)
#undef EMULATED_MIN_MAX
EMULATED float min(float a, float b) { return std::fmin(a, b); }
EMULATED float max(float a, float b) { return std::fmax(a, b); }
