// Kernels for what sm_90 adds; tests/test_emulator_sm90.py starts them by name.
#include "panel_tile.cuh"
#include "test_kernels.h"

namespace fastattn::cuda {
namespace {

FASTATTN_DEVICE const CUtensorMap* map(const Arguments& a, int i) {
  return pointer<const CUtensorMap>(a, i);
}

// One barrier at the start of shared memory's last 1024 bytes, for a block of any size.
FASTATTN_DEVICE uint64_t* make_barrier(unsigned char* at, int arrivals) {
  auto* barrier = reinterpret_cast<uint64_t*>(at);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, arrivals);
    ptx::fence_proxy_async();
  }
  __syncthreads();
  return barrier;
}

// A box of map 0, whose first element has coordinates number[0 … 3], through shared memory to the
// linear bytes of pointer 1, as they lie there.
__global__ void load_box(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  constexpr int kBytes = 16 * 128;
  uint64_t* barrier = make_barrier(shared + kBytes, 1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, kBytes);
    ptx::tma_load(shared, map(a, 0), barrier, a.number[0], a.number[1], a.number[2], a.number[3]);
  }
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < kBytes / 4; i += blockDim.x) {
    pointer<uint32_t>(a, 1)[i] = reinterpret_cast<uint32_t*>(shared)[i];
  }
}

// The linear floats of pointer 0 to a box of map 1 at row number[0], stored (number[1] = 0) or
// added; twice, from one tile. number[2] = 1: rewrites the tile without waiting.
__global__ void store_box(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* tile = reinterpret_cast<float*>(shared);
  constexpr int kFloats = 16 * 32;
  for (int round = 0; round < 2; round++) {
    if (round > 0 && a.number[2] == 0) {
      if (threadIdx.x == 0) ptx::bulk_wait_read<0>();
      __syncthreads();
    }
    for (int i = threadIdx.x; i < kFloats; i += blockDim.x) {
      tile[i] = pointer<float>(a, 0)[i] * static_cast<float>(round + 1);
    }
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      if (a.number[1] == 0) {
        ptx::tma_store(map(a, 1), shared, 0, a.number[0] + 16 * round, 0, 0);
      } else {
        ptx::tma_reduce_add(map(a, 1), shared, 0, a.number[0], 0, 0);
      }
      ptx::bulk_commit();
    }
  }
  if (threadIdx.x == 0) ptx::bulk_wait<0>();
}

// pointer 2 (64, N) = A (64, 64) · B (64, N): map 0 has A or, MN-major, its transpose; map 1 B's
// transpose or, MN-major, B. With kRegisters A comes through registers.
template <class T, ptx::Major kA, ptx::Major kB, int kN, bool kRegisters>
__global__ void product(const __grid_constant__ Arguments a) {
  using ptx::Major;
  using ATile = PanelTile<64, 64>;
  using BTile = std::conditional_t<kB == Major::kK, PanelTile<kN, 64>, PanelTile<64, kN>>;
  FASTATTN_SHARED(shared);
  const ATile sA{shared};
  const BTile sB{shared + ATile::kBytes};
  uint64_t* barrier = make_barrier(shared + ATile::kBytes + BTile::kBytes, 1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect_tx(barrier, ATile::kBytes + BTile::kBytes);
    sA.load(*map(a, 0), barrier, 0, 0, 0);
    sB.load(*map(a, 1), barrier, 0, 0, 0);
  }
  ptx::mbarrier_wait(barrier, 0);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  float d[kN / 8][4];
  for (auto& quad : d) {
    for (float& x : quad) x = 1.0f;
  }
  uint32_t registers[4][4];
  for (int k = 0; k < 4; k++) {
    for (int q = 0; q < 4; q++) {  // rows are 128 bytes; 16-byte pieces are swizzled
      const int r = row + q % 2 * 8, byte = 2 * (16 * k + column + q / 2 * 8);
      registers[k][q] = *reinterpret_cast<uint32_t*>(shared + 128 * r + (byte ^ r % 8 << 4));
    }
  }
  ptx::wgmma_fence();
  for (int k = 0; k < 4; k++) {
    const uint64_t b = kB == Major::kK ? sB.rows(0, k) : sB.columns(k);
    if constexpr (kRegisters) {
      ptx::wgmma<kB>(d, registers[k], b, true, T{});
    } else {
      const uint64_t first = kA == Major::kK ? sA.rows(0, k) : sA.columns(k);
      ptx::wgmma<kA, kB>(d, first, b, k > 0, T{});
    }
  }
  ptx::wgmma_commit();
  if (a.number[0] == 0) ptx::wgmma_wait<0>();
  for (int n = 0; n < kN / 8; n++) {
    for (int i = 0; i < 4; i++) {
      pointer<float>(a, 2)[(row + i / 2 * 8) * kN + 8 * n + column + i % 2] = d[n][i];
    }
  }
  if (a.number[0] != 0) ptx::wgmma_wait<0>();
}

// pointer 2 (64, 64) = Σ A_i · B over number[0] tiles A_i: map 0 has them below each other, map 1 has
// B transposed. A producer warpgroup fills two stages, a consumer multiplies; the result leaves
// through shared memory by map 3.
__global__ void pipeline(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  using Tile = PanelTile<64, 64>;
  const Tile sA[2] = {{shared}, {shared + Tile::kBytes}}, sB{shared + 2 * Tile::kBytes};
  auto* full = reinterpret_cast<uint64_t*>(shared + 5 * Tile::kBytes);
  auto* empty = full + 2;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, 1);
    }
    ptx::fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x >= 256) return;  // a third warpgroup, whose registers stay with it
  if (threadIdx.x < 128) {
    ptx::set_max_registers_down<24>();
    for (int i = 0; threadIdx.x == 0 && i < a.number[0]; i++) {
      const int stage = i % 2, phase = i / 2 % 2;
      if (i >= 2) ptx::mbarrier_wait(empty + stage, phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(full + stage, Tile::kBytes * (i == 0 ? 2 : 1));
      if (i == 0) sB.load(*map(a, 1), full, 0, 0, 0);
      sA[stage].load(*map(a, 0), full + stage, 64 * i, 0, 0);
    }
    return;
  }
  ptx::set_max_registers_up<240>();
  float d[8][4] = {};
  for (int i = 0; i < a.number[0]; i++) {
    const int stage = i % 2, phase = i / 2 % 2;
    ptx::mbarrier_wait(full + stage, phase);
    ptx::wgmma_fence();
    for (int k = 0; k < 4; k++) {
      ptx::wgmma<ptx::Major::kK, ptx::Major::kK>(d, sA[stage].rows(0, k), sB.rows(0, k), true,
                                                  bf16{});
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    if (threadIdx.x == 128 && i + 2 < a.number[0]) ptx::mbarrier_arrive(empty + stage);
  }
  const int t = threadIdx.x - 128, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  auto* result = reinterpret_cast<float*>(shared + 3 * Tile::kBytes);
  for (int n = 0; n < 8; n++) {
    for (int i = 0; i < 4; i++) {
      result[(row + i / 2 * 8) * 64 + 8 * n + column + i % 2] = d[n][i];
    }
  }
  ptx::fence_proxy_async();
  ptx::bar_sync(1, 128);
  if (t == 0) {
    ptx::tma_store(map(a, 3), result, 0, 0, 0, 0);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
}

// Takes number[0] registers more than there are, or arrives once too often, or waits for nobody.
__global__ void wrong_uses(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  uint64_t* barrier = make_barrier(shared, 1);
  if (a.number[0] == 0) {  // two times 248 of 504
    if (threadIdx.x < 128) {
      ptx::set_max_registers_down<24>();
    } else {
      ptx::set_max_registers_up<248>();
    }
  } else if (a.number[0] == 1) {
    if (threadIdx.x < 2) ptx::mbarrier_wait(barrier, 0);
  } else if (a.number[0] == 2) {
    ptx::mbarrier_arrive(barrier + 1);
  } else if (a.number[0] == 3) {
    ptx::set_max_registers_up<232>();
  } else if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
  }
}

// Waits on a barrier that another thread made, with nothing between.
__global__ void barrier_without_sync(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* barrier = reinterpret_cast<uint64_t*>(shared);
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 1);
  if (a.number[0] == 0) __syncthreads();
  if (threadIdx.x == 32) ptx::mbarrier_arrive(barrier);
}

TEST_KERNEL(load_box);
TEST_KERNEL(store_box);
TEST_KERNEL(pipeline);
TEST_KERNEL(wrong_uses);
TEST_KERNEL(barrier_without_sync);
using ptx::Major;
const Registered products[] = {
    {"product_k_k_64", product<bf16, Major::kK, Major::kK, 64, false>},
    {"product_k_k_112", product<fp16, Major::kK, Major::kK, 112, false>},
    {"product_k_mn_96", product<bf16, Major::kK, Major::kMN, 96, false>},
    {"product_mn_k_64", product<bf16, Major::kMN, Major::kK, 64, false>},
    {"product_mn_mn_128", product<fp16, Major::kMN, Major::kMN, 128, false>},
    {"product_registers_k_80", product<bf16, Major::kK, Major::kK, 80, true>},
    {"product_registers_mn_256", product<fp16, Major::kK, Major::kMN, 256, true>},
};

}  // namespace

// A (1, 1, rows, cols) tensor and its boxes, into 128 bytes. Null, or what is wrong with it.
extern "C" const char* make_tensor_map(CUtensorMap* map, int element_bytes, void* base, int rows,
                                       int cols, int stride, int box_rows, int box_cols,
                                       int swizzled) {
  return emulator::guarded([&] {
    const auto row = static_cast<uint64_t>(stride), all = row * rows;
    *map = emulator::encode_tensor_map(
        element_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        base, {static_cast<uint64_t>(cols), static_cast<uint64_t>(rows), 1, 1}, {row, all, all},
        {static_cast<uint32_t>(box_cols), static_cast<uint32_t>(box_rows), 1, 1}, swizzled != 0);
  });
}

}  // namespace fastattn::cuda
