// Rung 6: Hopper's own instructions. The tensor cores read shared memory by themselves.
//
// Adds wgmma, by which 128 threads multiply 64 rows of registers or shared memory with a whole tile
// in shared memory, asynchronously; TMA, by which one thread copies a tile, swizzled as wgmma reads
// it and with zeros where the tensor ends; and mbarriers, on which a phase ends when so many
// threads and so many bytes have come. A producer warp fills a ring of two stages; a consumer
// warpgroup waits for a full one, multiplies and frees it. Nobody computes an address of K or V any
// more, and the loop has no barrier of the whole block.
//
// The bound: products and softmax of a warpgroup take turns, and while one runs the other's unit is
// idle. At D = 128 an SM's tensor cores need 512 cycles for 64 × 64 scores and their share of the
// outputs, and the 410 instructions of each of four warps another 410. More than one block on an SM
// (40 or 80 KB each) fill each other's gaps, but only by chance.
#include "ladder.h"
#include "softmax.h"
#include "tile_sm90.h"

namespace ladder {

using ptx::Major;

constexpr int kQueries = 64, kKeys = 64, kStages = 2;
constexpr int kConsumers = 128, kThreads = kConsumers + 32;

struct Launch {
  CUtensorMap q, k, v;
  Attention<bf16> a;
};

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    wgmma_tma_kernel(const __grid_constant__ Launch launch) {
  using Tile = ladder::Tile<64, kHeadDim>;
  const Attention<bf16>& a = launch.a;
  FASTATTN_SHARED(shared);
  const Tile sQ{shared};
  const auto sK = [&](int stage) { return Tile{shared + (1 + 2 * stage) * Tile::kBytes}; };
  const auto sV = [&](int stage) { return Tile{shared + (2 + 2 * stage) * Tile::kBytes}; };
  auto* full = reinterpret_cast<uint64_t*>(shared + (1 + 2 * kStages) * Tile::kBytes);
  uint64_t* empty = full + kStages;
  const int first_query = blockIdx.x * kQueries, head = blockIdx.y;
  const int blocks = static_cast<int>(ceil_div(a.seqlen, kKeys));

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      ptx::mbarrier_init(full + stage, 1);
      ptx::mbarrier_init(empty + stage, kConsumers / 32);
    }
    ptx::fence_proxy_async();
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {  // the producer: one thread of its warp
    if (threadIdx.x > kConsumers) return;
    for (int block = 0; block < blocks; block++) {
      const int stage = block % kStages, phase = block / kStages % 2;
      ptx::mbarrier_wait(empty + stage, phase ^ 1);  // at once in the first round
      ptx::mbarrier_arrive_expect_tx(full + stage, (block == 0 ? 3 : 2) * Tile::kBytes);
      if (block == 0) sQ.load(launch.q, full, first_query, head);
      sK(stage).load(launch.k, full + stage, block * kKeys, head);
      sV(stage).load(launch.v, full + stage, block * kKeys, head);
    }
    return;
  }

  float out[kHeadDim / 8][4] = {};
  Softmax softmax(a.scale);
  for (int block = 0; block < blocks; block++) {
    const int stage = block % kStages, phase = block / kStages % 2;
    ptx::mbarrier_wait(full + stage, phase);

    float scores[kKeys / 8][4];
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; k++) {
      ptx::wgmma<Major::kK, Major::kK>(scores, sQ.rows(0, k), sK(stage).rows(0, k), k > 0, bf16{});
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::settle(scores);

    if (block + 1 == blocks) softmax.hide(scores, a.seqlen - block * kKeys);
    uint32_t weights[kKeys / 16][4];
    softmax.weigh(scores, weights, out);

    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kKeys / 16; k++) {
      ptx::wgmma<Major::kMN>(out, weights[k], sV(stage).columns(k), true, bf16{});
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::settle(out);
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + stage);
  }

  const int row = first_query + threadIdx.x / 32 * 16;
  bf16* to = a.out + (int64_t{head} * a.seqlen + row) * kHeadDim;
  softmax.store(out, to, a.seqlen - row);
}

template <int kHeadDim>
constexpr int kSharedBytes = (1 + 2 * kStages) * Tile<64, kHeadDim>::kBytes + 2 * kStages * 8;

template <int kHeadDim, class T>
void forward(const Attention<T>& a, const Device& device) {
  const auto map = [&](const bf16* data) { return map_of(a, data, kHeadDim, 64); };
  const Grid grid{ceil_div(a.seqlen, kQueries), a.heads, 1, kThreads, kSharedBytes<kHeadDim>};
  launch(wgmma_tma_kernel<kHeadDim>, grid, Launch{map(a.q), map(a.k), map(a.v), a}, device,
         "wgmma and TMA");
}

LADDER_RUNG(bf16);

}  // namespace ladder
