// The functions of csrc/cuda/ptx_sm90.cuh on the emulator.
#pragma once

#include <cstdint>

#include "elements.cuh"

namespace fastattn::cuda::ptx {

using emulator::Format;
using emulator::Site;

EMULATED uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::shared_memory());
}

// --- barriers ------------------------------------------------------------------------------------

EMULATED void bar_sync(int id, int threads, Site site = Site::here()) {
  emulator::named_barrier(id, threads, true, site);
}
EMULATED void bar_arrive(int id, int threads, Site site = Site::here()) {
  emulator::named_barrier(id, threads, false, site);
}

EMULATED void mbarrier_init(uint64_t* barrier, int arrivals, Site site = Site::here()) {
  emulator::mbarrier_init(barrier, arrivals, site);
}
EMULATED void mbarrier_arrive(uint64_t* barrier, Site site = Site::here()) {
  emulator::mbarrier_arrive(barrier, site);
}
EMULATED void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes, Site site = Site::here()) {
  emulator::mbarrier_arrive_expect_tx(barrier, bytes, site);
}
EMULATED void mbarrier_wait(uint64_t* barrier, int parity, Site site = Site::here()) {
  emulator::mbarrier_wait(barrier, parity, site);
}

EMULATED void fence_proxy_async(Site site = Site::here()) { emulator::fence_proxy_async(site); }

// --- bulk copies ---------------------------------------------------------------------------------

EMULATED void tma_load(void* tile, const CUtensorMap* map, uint64_t* barrier, int c0, int c1,
                       int c2, int c3, Site site = Site::here()) {
  emulator::tma_load(tile, map, barrier, {c0, c1, c2, c3}, site);
}
EMULATED void tma_store(const CUtensorMap* map, const void* tile, int c0, int c1, int c2, int c3,
                        Site site = Site::here()) {
  emulator::tma_store(map, tile, {c0, c1, c2, c3}, site);
}
EMULATED void tma_reduce_add(const CUtensorMap* map, const void* tile, int c0, int c1, int c2,
                             int c3, Site site = Site::here()) {
  emulator::tma_reduce_add(map, tile, {c0, c1, c2, c3}, site);
}
EMULATED void bulk_commit() { emulator::bulk_commit(); }
template <int N>
EMULATED void bulk_wait(Site site = Site::here()) {
  emulator::bulk_wait(N, site);
}
template <int N>
EMULATED void bulk_wait_read(Site site = Site::here()) {
  emulator::bulk_wait_read(N, site);
}
EMULATED void prefetch_tensor_map(const CUtensorMap* map) {}

// --- products of a warpgroup ---------------------------------------------------------------------

EMULATED void wgmma_fence(Site site = Site::here()) { emulator::wgmma_fence(site); }
EMULATED void wgmma_commit() { emulator::wgmma_commit(); }
template <int N>
EMULATED void wgmma_wait(Site site = Site::here()) {
  emulator::wgmma_wait(N, site);
}

template <int kN>
EMULATED void settle(float (&d)[kN][4]) {}

EMULATED constexpr Format format_of(bf16) { return Format::kBF16; }
EMULATED constexpr Format format_of(fp16) { return Format::kFP16; }

template <Major kA, Major kB, int kN, class T>
EMULATED void wgmma(float (&d)[kN][4], uint64_t a, uint64_t b, bool accumulate, T type,
                    Site site = Site::here()) {
  emulator::wgmma(&d[0][0], 8 * kN,
                  {format_of(type), kA == Major::kMN, kB == Major::kMN, nullptr, a, b, accumulate},
                  site);
}
template <Major kB, int kN, class T>
EMULATED void wgmma(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, T type,
                    Site site = Site::here()) {
  emulator::wgmma(&d[0][0], 8 * kN, {format_of(type), false, kB == Major::kMN, a, 0, b, accumulate},
                  site);
}

// --- registers -----------------------------------------------------------------------------------

template <int N>
EMULATED void set_max_registers_up(Site site = Site::here()) {
  emulator::set_max_registers(N, true, site);
}
template <int N>
EMULATED void set_max_registers_down(Site site = Site::here()) {
  emulator::set_max_registers(N, false, site);
}

}  // namespace fastattn::cuda::ptx
