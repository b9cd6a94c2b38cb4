// Rung 7: two warpgroups take turns, and the SM never lets go. FlashAttention-3's schedule (Shah et
// al., 2024), without its overlap inside a warpgroup.
//
// Adds:
// - Ping-pong: two consumer warpgroups of 64 queries each share the copies of K and V. A named
//   barrier gives the tensor cores to one of them for P·V(n) and Q·K(n + 1)ᵀ at once, while the
//   other is in its softmax: what rung 6 left to chance is arranged.
// - setmaxnreg: the producer gives up its registers, so that a consumer's thread has 240, enough
//   for 128 keys at a time.
// - Persistence: a block an SM, which goes on to its next queries. Their copies are under way
//   before the last outputs are stored.
//
// The bound: tensor cores, if a softmax takes no longer than the other's products. At D = 128 it
// does not: of two times 64 × 128 scores products take 2048 cycles, exponentials 1024, instructions
// 1290. At D = 64 products take 1024 and instructions 1150. What is left on the table: the kernel
// in csrc/cuda/attn_fwd_sm90.cuh runs a softmax beside the same warpgroup's products, too.
#include "ladder.h"
#include "softmax.h"
#include "tile_sm90.h"

namespace ladder {

using ptx::Major;

constexpr int kQueries = 128, kKeys = 128, kStages = 2;
constexpr int kConsumers = 256, kThreads = kConsumers + 128;
constexpr int kBarriers = 1 + 2 * kStages;  // of Q, of the buffers of K and V

struct Launch {
  CUtensorMap q, k, v;
  Attention<bf16> a;
  int tiles, items;  // of a head, of all heads
};

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    ping_pong_kernel(const __grid_constant__ Launch launch) {
  using Tile = ladder::Tile<128, kHeadDim>;
  const Attention<bf16>& a = launch.a;
  FASTATTN_SHARED(shared);
  // Block n of keys, counted over all items of this block of threads, is in buffers n % kStages.
  const Tile sQ{shared};
  const auto sK = [&](int n) { return Tile{shared + (1 + n % kStages) * Tile::kBytes}; };
  const auto sV = [&](int n) { return Tile{shared + (1 + kStages + n % kStages) * Tile::kBytes}; };
  auto* q_full = reinterpret_cast<uint64_t*>(shared + kBarriers * Tile::kBytes);
  const auto k_full = [&](int n) { return q_full + 1 + n % kStages; };
  const auto v_full = [&](int n) { return q_full + 1 + kStages + n % kStages; };
  const auto empty = [](uint64_t* full) { return full + kBarriers; };
  const auto phase = [](int n) { return n / kStages % 2; };
  const int blocks = static_cast<int>(ceil_div(a.seqlen, kKeys));

  if (threadIdx.x == 0) {
    for (int i = 0; i < kBarriers; i++) {
      ptx::mbarrier_init(q_full + i, 1);
      ptx::mbarrier_init(empty(q_full + i), kConsumers / 32);
    }
    ptx::fence_proxy_async();
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {
    ptx::set_max_registers_down<24>();
    if (threadIdx.x > kConsumers) return;
    const auto load = [&](const Tile& tile, const CUtensorMap& map, uint64_t* full, int phase,
                          int row, int head) {
      ptx::mbarrier_wait(empty(full), phase ^ 1);
      ptx::mbarrier_arrive_expect_tx(full, Tile::kBytes);
      tile.load(map, full, row, head);
    };
    int n = 0;
    for (int item = blockIdx.x, i = 0; item < launch.items; item += gridDim.x, i++) {
      const int head = item / launch.tiles;
      load(sQ, launch.q, q_full, i % 2, item % launch.tiles * kQueries, head);
      for (int block = 0; block < blocks; block++, n++) {
        load(sK(n), launch.k, k_full(n), phase(n), block * kKeys, head);
        load(sV(n), launch.v, v_full(n), phase(n), block * kKeys, head);
      }
    }
    return;
  }

  ptx::set_max_registers_up<240>();
  const int consumer = threadIdx.x / 128;
  const auto my_turn = [&] {
    ptx::bar_sync(1 + consumer, kConsumers);
    ptx::wgmma_fence();
  };
  const auto pass_on = [&] {
    ptx::wgmma_commit();
    ptx::bar_arrive(2 - consumer, kConsumers);
    ptx::wgmma_wait<0>();
  };
  const auto release = [&](uint64_t* full) {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty(full));
  };
  float out[kHeadDim / 8][4], scores[kKeys / 8][4];
  uint32_t weights[kKeys / 16][4];
  const auto issue_scores = [&](int n) {
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; k++) {
      const uint64_t q = sQ.rows(64 * consumer, k);
      ptx::wgmma<Major::kK, Major::kK>(scores, q, sK(n).rows(0, k), k > 0, bf16{});
    }
  };
  const auto issue_output = [&](int n) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; k++) {
      ptx::wgmma<Major::kMN>(out, weights[k], sV(n).columns(k), true, bf16{});
    }
  };

  if (consumer == 1) ptx::bar_arrive(1, kConsumers);  // lets the first one begin
  int n = 0;
#pragma unroll 1
  for (int item = blockIdx.x, i = 0; item < launch.items; item += gridDim.x, i++) {
    Softmax softmax(a.scale);
#pragma unroll
    for (auto& x : out) x[0] = x[1] = x[2] = x[3] = 0.0f;

    ptx::mbarrier_wait(q_full, i % 2);
    ptx::mbarrier_wait(k_full(n), phase(n));
    my_turn();
    issue_scores(n);
    pass_on();
    ptx::settle(scores);
    release(k_full(n));
    if (blocks == 1) softmax.hide(scores, a.seqlen);
    softmax.weigh(scores, weights, out);
#pragma unroll 1
    for (int block = 1; block < blocks; block++, n++) {
      ptx::mbarrier_wait(v_full(n), phase(n));
      ptx::mbarrier_wait(k_full(n + 1), phase(n + 1));
      my_turn();
      issue_output(n);
      issue_scores(n + 1);
      pass_on();
      ptx::settle(out);
      ptx::settle(scores);
      release(v_full(n));
      release(k_full(n + 1));
      if (block + 1 == blocks) softmax.hide(scores, a.seqlen - block * kKeys);
      softmax.weigh(scores, weights, out);
    }
    release(q_full);
    ptx::mbarrier_wait(v_full(n), phase(n));
    my_turn();
    issue_output(n);
    pass_on();
    ptx::settle(out);
    release(v_full(n));
    n++;

    const int row = item % launch.tiles * kQueries + threadIdx.x / 32 * 16;
    bf16* to = a.out + (int64_t{item / launch.tiles} * a.seqlen + row) * kHeadDim;
    softmax.store(out, to, a.seqlen - row);
  }
}

template <int kHeadDim>
constexpr int kSharedBytes = kBarriers * Tile<128, kHeadDim>::kBytes + 2 * kBarriers * 8;

template <int kHeadDim, class T>
void forward(const Attention<T>& a, const Device& device) {
  const auto map = [&](const bf16* data) { return map_of(a, data, kHeadDim, 128); };
  const int tiles = static_cast<int>(ceil_div(a.seqlen, kQueries)), items = tiles * a.heads;
  const Grid grid{fastattn::lesser(items, device.multiprocessors), 1, 1, kThreads,
                  kSharedBytes<kHeadDim>};
  launch(ping_pong_kernel<kHeadDim>, grid, Launch{map(a.q), map(a.k), map(a.v), a, tiles, items},
         device, "ping-pong");
}

LADDER_RUNG(bf16);

}  // namespace ladder
