// Probes of ptx_sm90.cuh.
#include "calibration.cuh"
#include "panel_tile.cuh"
#include "tensor_map.cu"

namespace fastattn::cuda {
namespace {

using ptx::Major;

// --- barriers and registers ----------------------------------------------------------------------

// The second warp hands its words to the first three times, by an mbarrier each way.
struct Mbarriers {
  static constexpr int kThreads = 64, kIn = 3, kOut = 3, kShared = 16 + 128;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    auto *full = reinterpret_cast<uint64_t*>(shared), *empty = full + 1;
    auto* word = reinterpret_cast<uint32_t*>(shared + 16) + threadIdx.x % 32;
    if (threadIdx.x == 0) {
      ptx::mbarrier_init(full, 32);
      ptx::mbarrier_init(empty, 32);
    }
    __syncthreads();
    for (int round = 0; round < 3; round++) {
      if (threadIdx.x >= 32) {
        ptx::mbarrier_wait(empty, round % 2 ^ 1);
        *word = in[round];
        ptx::mbarrier_arrive(full);
        out[round] = ~in[round];
      } else {
        ptx::mbarrier_wait(full, round % 2);
        out[round] = *word;
        ptx::mbarrier_arrive(empty);
      }
    }
  }
};

// As NamedBarriers, by barriers that are known at run time only.
struct RunTimeBarriers {
  static constexpr int kThreads = 64, kIn = 1, kOut = 1, kShared = 256;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    auto* words = reinterpret_cast<uint32_t*>(shared);
    const int thread = threadIdx.x, other = thread ^ 63, id = 1 + static_cast<int>(blockIdx.x % 14);
    words[thread] = in[0];
    if (thread >= 32) {
      ptx::bar_arrive(id, 64);
    } else {
      ptx::bar_sync(id, 64);
      out[0] = words[other];
    }
    ptx::bar_sync(id + 1, 64);
    if (thread >= 32) out[0] = words[other];
  }
};

// A warpgroup gives registers away, two take them and keep 32 words there.
struct SetMaxRegisters {
  static constexpr int kThreads = 384, kIn = 32, kOut = 1, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    if (threadIdx.x >= 256) {
      ptx::set_max_registers_down<24>();
      out[0] = in[0];
      return;
    }
    uint32_t words[kIn], sum = 0;
    for (int i = 0; i < kIn; i++) words[i] = in[i];
    ptx::set_max_registers_up<240>();
    for (int i = 0; i < kIn; i++) sum = 33 * sum + words[i];
    out[0] = sum;
  }
};

// --- bulk copies ---------------------------------------------------------------------------------

struct MappedWords {
  Words words;
  CUtensorMap map;
};
template <class Probe>
__global__ void __launch_bounds__(Probe::kThreads)
    mapped_probe_kernel(const __grid_constant__ MappedWords p) {
  FASTATTN_SHARED(shared);
  const int64_t thread = int64_t(blockIdx.x) * Probe::kThreads + threadIdx.x;
  Probe::run(p.words.in + thread * Probe::kIn, p.map, shared, p.words.out + thread * Probe::kOut);
}
template <class Probe>
Entry mapped_entry() {
  return {Probe::kThreads, Probe::kIn, Probe::kOut, Probe::kShared,
          [](const Entry& e, const Words& words, int blocks, const char* name) {
            const MappedWords p{words, tensor_map(Probe::tensor(words, blocks))};
            launch(mapped_probe_kernel<Probe>, e.grid(blocks), p, Device{}, name);
          }};
}

// The words of a probe's blocks as a tensor that boxes of 16 rows are copied of: (blocks, 18 rows,
// 3 heads) of 144 bytes, 2048 words apart.
MappedTensor boxes(DType dtype, const uint32_t* words, int blocks) {
  const int64_t bytes = dtype == DType::kF32 ? 4 : 2, cols = 144 / bytes;
  return {dtype, words, blocks, 18, 3, cols, {8192 / bytes, cols, 18 * cols}, 16};
}
constexpr int kBoxBytes = 16 * 128;

// Where a block's box begins, in the tensor or partly or wholly beyond it.
struct Corner {
  int column, row, head, batch;
};
FASTATTN_DEVICE Corner corner(int unit) {  // `unit`: elements in 16 bytes
  const int block = static_cast<int>(blockIdx.x);
  return {block % 5 * 2 * unit, block % 7 * 5 - 9, block / 2 % 4, block};
}

// in: a tensor; out: a box of it, as it lies in shared memory
template <DType kType>
struct TmaLoad {
  static constexpr int kThreads = 128, kIn = 16, kOut = 4, kShared = kBoxBytes + 8;
  static MappedTensor tensor(const Words& words, int blocks) {
    return boxes(kType, words.in, blocks);
  }
  static FASTATTN_DEVICE void run(const uint32_t*, const CUtensorMap& map, unsigned char* shared,
                                  uint32_t* out) {
    auto* barrier = reinterpret_cast<uint64_t*>(shared + kBoxBytes);
    if (threadIdx.x == 0) {
      ptx::prefetch_tensor_map(&map);
      ptx::mbarrier_init(barrier, 1);
      ptx::fence_proxy_async();
      const Corner c = corner(kType == DType::kF32 ? 4 : 8);
      ptx::mbarrier_arrive_expect_tx(barrier, kBoxBytes);
      ptx::tma_load(shared, &map, barrier, c.column, c.row, c.head, c.batch);
    }
    __syncthreads();
    ptx::mbarrier_wait(barrier, 0);
    const auto* words = reinterpret_cast<const uint32_t*>(shared) + 4 * threadIdx.x;
    for (int i = 0; i < 4; i++) out[i] = words[i];
  }
};

// in: two tiles; out: a tensor of floats that one tile after the other was copied to. Stored, the
// second goes to the next rows; added, to the same.
template <bool kAdds>
struct TmaStore {
  static constexpr int kThreads = 128, kIn = 8, kOut = 16, kShared = kBoxBytes;
  static MappedTensor tensor(const Words& words, int blocks) {
    return boxes(DType::kF32, words.out, blocks);
  }
  static FASTATTN_DEVICE void run(const uint32_t* in, const CUtensorMap& map, unsigned char* shared,
                                  uint32_t*) {
    const Corner c = corner(4);
    for (int tile = 0; tile < 2; tile++) {
      auto* words = reinterpret_cast<uint32_t*>(shared) + 4 * threadIdx.x;
      for (int i = 0; i < 4; i++) words[i] = in[4 * tile + i];
      ptx::fence_proxy_async();
      __syncthreads();
      if (threadIdx.x == 0) {
        if constexpr (kAdds) {
          ptx::tma_reduce_add(&map, shared, c.column, c.row, c.head, c.batch);
        } else {
          ptx::tma_store(&map, shared, c.column, c.row + 16 * tile, c.head, c.batch);
        }
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) ptx::bulk_wait<0>();
  }
};

// --- products of a warpgroup ---------------------------------------------------------------------

// in: tiles of A (64, 64) and B (64, kN) as they lie in shared memory, word i of thread t at
// 128·i + t; d (64, kN). out: d + A · B, or, of every other block, A · B. calibration_wgmma.py
// knows.
template <class T, int kN, Major kA, Major kB, bool kRegisters>
struct Wgmma {
  using ATile = PanelTile<64, 64>;
  using BTile = std::conditional_t<kB == Major::kK, PanelTile<kN, 64>, PanelTile<64, kN>>;
  static constexpr int kTileBytes = ATile::kBytes + BTile::kBytes;
  static constexpr int kTileWords = kTileBytes / 512;  // of a thread
  static constexpr int kThreads = 128, kIn = kTileWords + kN / 2, kOut = kN / 2;
  static constexpr int kShared = kTileBytes;

  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    auto* words = reinterpret_cast<uint32_t*>(shared);
    for (int i = 0; i < kTileWords; i++) words[128 * i + threadIdx.x] = in[i];
    ptx::fence_proxy_async();
    __syncthreads();
    const ATile sA{shared};
    const BTile sB{shared + ATile::kBytes};
    float d[kN / 8][4];
    for (int i = 0; i < kN / 2; i++) d[i / 4][i % 4] = as_float(in[kTileWords + i]);
    uint32_t a[4][4];
    if constexpr (kRegisters) {
      const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      for (int i = 0; i < 16; i++) {
        const int chunk = i / 4 * 2 + i % 4 / 2;
        a[i / 4][i % 4] = reinterpret_cast<uint32_t*>(sA.chunk(row + i % 2 * 8, chunk))[t];
      }
    }
    const bool accumulate = blockIdx.x % 2 == 0;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint64_t b = kB == Major::kK ? sB.rows(0, k) : sB.columns(k);
      if constexpr (kRegisters) {
        ptx::wgmma<kB>(d, a[k], b, accumulate || k > 0, T{});
      } else {
        const uint64_t first = kA == Major::kK ? sA.rows(0, k) : sA.columns(k);
        ptx::wgmma<kA, kB>(d, first, b, accumulate || k > 0, T{});
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::settle(d);
    for (int i = 0; i < kN / 2; i++) out[i] = __float_as_uint(d[i / 4][i % 4]);
  }
};

const bool registered = add({
    {"mbarriers", entry<Mbarriers>()},
    {"run_time_barriers", entry<RunTimeBarriers>()},
    {"set_max_registers", entry<SetMaxRegisters>()},
    {"tma_load_fp32", mapped_entry<TmaLoad<DType::kF32>>()},
    {"tma_load_bf16", mapped_entry<TmaLoad<DType::kBF16>>()},
    {"tma_load_fp16", mapped_entry<TmaLoad<DType::kF16>>()},
    {"tma_store", mapped_entry<TmaStore<false>>()},
    {"tma_reduce_add", mapped_entry<TmaStore<true>>()},
});

// Operands as products_sm90.cuh has them: Q · Kᵀ, P · V, and 64 columns of dS · K.
template <class T, int kN>
void add_wgmma(const std::string& type) {
  const std::string suffix = "_" + std::to_string(kN) + "_" + type;
  add({{"wgmma_k_k" + suffix, entry<Wgmma<T, kN, Major::kK, Major::kK, false>>()},
       {"wgmma_registers_mn" + suffix, entry<Wgmma<T, kN, Major::kK, Major::kMN, true>>()}});
  if constexpr (kN == 64) {
    add({{"wgmma_mn_mn" + suffix, entry<Wgmma<T, kN, Major::kMN, Major::kMN, false>>()}});
  }
}
template <int... kN>
bool add_wgmmas() {
  (add_wgmma<bf16, kN>("bf16"), ...);
  (add_wgmma<fp16, kN>("fp16"), ...);
  return true;
}
const bool wgmmas_registered = add_wgmmas<64, 80, 96, 112, 128, 192, 256>();

}  // namespace
}  // namespace fastattn::cuda
