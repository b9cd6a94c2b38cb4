// What the emulator offers to kernels (through emulated_cuda.h and emulated_ptx.h) and to the host
// code that starts them. The run time behind it is compiled without instrumentation.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "site.h"
#include "emulated_tensor_map.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

// --- who is running ------------------------------------------------------------------------------

struct ThreadIds {
  dim3 thread, block, block_dim, grid_dim;
};
// Constant for as long as a kernel's function runs: that is on one fiber.
__attribute__((const)) const ThreadIds& ids();
__attribute__((const)) unsigned char* shared_memory();

// --- barriers ------------------------------------------------------------------------------------

void sync_threads(Site site);
void sync_warp(uint32_t mask, Site site);
// bar.sync (wait) and bar.arrive (no wait) of `threads` threads on barrier `id`, 0 … 15.
void named_barrier(int id, int threads, bool wait, Site site);

// --- warp instructions: all 32 lanes must come ---------------------------------------------------

enum class Shuffle { kIndex, kUp, kDown, kXor };
uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, int width, Site site);
uint32_t ballot(uint32_t mask, bool predicate, Site site);

// `count` (1, 2, 4) 8×8 matrices of 16-bit elements from shared memory.
void ldmatrix(uint32_t* r, const void* row, int count, bool transposed, Site site);

enum class Format { kBF16, kFP16 };
// d (16, 8) += a (16, k) · b (k, 8); a lane has k / 4 registers of a and half as many of b.
void mma(float* d, const uint32_t* a, const uint32_t* b, Format format, int k, Site site);

// --- asynchronous copies -------------------------------------------------------------------------

// 16 bytes to shared memory: `bytes` of them from global memory, zeros behind.
void cp_async(void* shared, const void* global, int bytes, Site site);
void cp_async_commit();
void cp_async_wait(int groups_left, Site site);

// --- sm_90: mbarriers, bulk copies, products of a warpgroup --------------------------------------

void mbarrier_init(void* barrier, int count, Site site);
void mbarrier_arrive(void* barrier, Site site);
void mbarrier_arrive_expect_tx(void* barrier, int bytes, Site site);
void mbarrier_wait(void* barrier, int parity, Site site);

void fence_proxy_async(Site site);
// Boxes of a tensor whose first element has coordinates `at`, innermost first.
void tma_load(void* tile, const CUtensorMap* map, void* barrier, const int (&at)[4], Site site);
void tma_store(const CUtensorMap* map, const void* tile, const int (&at)[4], Site site);
void tma_reduce_add(const CUtensorMap* map, const void* tile, const int (&at)[4], Site site);
void bulk_commit();
void bulk_wait(int groups_left, Site site);
void bulk_wait_read(int groups_left, Site site);

// A product's operands: 16-bit elements, as descriptors of tiles or, for A, registers.
struct Operands {
  Format format;
  bool a_transposed, b_transposed;  // MN-major
  const uint32_t* a;                // 4 registers, or null: a_tile
  uint64_t a_tile, b_tile;
  bool accumulate;
};
// d (64, n) = a (64, 16) · b (16, n), or += that: by the 128 threads of a warpgroup.
void wgmma(float* d, int n, const Operands& operands, Site site);
void wgmma_fence(Site site);
void wgmma_commit();
void wgmma_wait(int groups_left, Site site);
void set_max_registers(int count, bool more, Site site);

// --- global memory -------------------------------------------------------------------------------

void thread_fence(Site site);
float atomic_add(float* p, float x, Site site);
int32_t atomic_add(int32_t* p, int32_t x, Site site);
uint32_t atomic_add(uint32_t* p, uint32_t x, Site site);
unsigned long long atomic_add(unsigned long long* p, unsigned long long x, Site site);
int32_t atomic_max(int32_t* p, int32_t x, Site site);
uint32_t atomic_max(uint32_t* p, uint32_t x, Site site);
uint32_t atomic_exchange(uint32_t* p, uint32_t x, Site site);
uint32_t atomic_compare_exchange(uint32_t* p, uint32_t expected, uint32_t x, Site site);
void yield();  // lets other threads run: __nanosleep

// --- host ----------------------------------------------------------------------------------------

// Runs `kernel` once on every thread of the grid. Throws std::runtime_error with the first reports
// if the emulator found fault; `what` names the kernel there.
void launch(dim3 grid, dim3 block, int shared_bytes, const std::string& what,
            const std::function<void()>& kernel);

// Whether a kernel that tests/cuda_faults.py has changed is to compute what is wrong here.
bool is_planted(int fault);

// Runs `body` for a caller that takes no exceptions: null, or what was thrown, until the next call.
const char* guarded(const std::function<void()>& body);

}  // namespace emulator

// For ctypes and the like. Functions return null or what was wrong.
extern "C" {
// Options, separated by commas; see options.h. They hold for the launches that follow.
const char* emulator_set_options(const char* text);
// A kernel may touch global memory only inside buffers named here beforehand.
void emulator_add_buffer(const void* address, int64_t bytes, const char* name, int writable);
void emulator_clear_buffers();
// The places of barriers, waits and fences that launches with the option `without` passed since the
// last call, one in a line.
const char* emulator_passed_places();
}
