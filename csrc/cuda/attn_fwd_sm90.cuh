// softmax(scale·QKᵀ …)V with wgmma and TMA, for sm_90a (Shah et al., "FlashAttention-3", 2024).
//
// A block of threads is one producer warpgroup, of which one thread copies tiles by TMA into rings
// of buffers, and two or three consumer warpgroups. Each consumer owns 64 queries of one head: S, P
// and O stay in its registers, P goes from accumulators to wgmma's operand where it is. Two things
// keep the tensor cores busy during a softmax:
//
//   Within a warpgroup  Q·K(n)ᵀ is issued before P·V(n + 1), and the softmax of block n runs while
//                       P·V(n + 1) does.
//   Between them        Warpgroups take turns at issuing products (named barriers), so that one's
//                       softmax falls into the other's products. For head dims up to 128: beyond,
//                       products take longer than the softmax anyway.
//
// Keys pass by in blocks of block_n, from the last to the first. Where an edge of the window
// crosses one, a branch leads through the masking: a loop apart for blocks inside would save some
// ten instructions of 519, and double the code. The grid has one block of threads an SM, which goes
// on to its next tile of queries while the copies for it are under way. Outputs leave by threads,
// 16 bytes each: TMA would write over the next sequence's, and wants strides that `out` need not
// have, so that it would be a second way. By SASS it saves a warp some 150 of 700 instructions
// behind the loop at head dim 128, where a causal tile among 1k keys takes the tensor cores 9,000
// cycles, and longer ones more.
#pragma once

#include <type_traits>

#include "fragments.cuh"
#include "launch.cuh"
#include "panel_tile.cuh"
#include "products_sm90.cuh"
#include "query_tile.cuh"
#include "repair.cuh"
#include "ring.cuh"
#include "score_mods.cuh"
#include "softmax.cuh"
#include "store_rows.cuh"
#include "tensor_map.h"
#include "tiles_sm90.cuh"

namespace fastattn::cuda {

struct AttnFwdSm90Launch {
  CUtensorMap q, k, v;
  AttnFwdLaunch fwd;
};

// The block's shared memory: tiles and barriers.
template <int kHeadDim, Scores kScores>
struct FwdSharedSm90 {
  static constexpr FwdTileSm90 kTile = fwd_tile_sm90(kHeadDim, kScores);
  using QTile = PanelTile<kTile.block_m(), kHeadDim>;
  using KVTile = PanelTile<kTile.block_n, kHeadDim>;
  static constexpr int kStages = FwdTileSm90::kStages;

  QTile q;
  unsigned char* kv;
  Ring<1> q_ring;
  Ring<kStages> k_ring, v_ring;

  FASTATTN_DEVICE explicit FwdSharedSm90(unsigned char* shared)
      : q{shared},
        kv(shared + QTile::kBytes),
        q_ring(barriers(shared)),
        k_ring(barriers(shared) + Ring<1>::kBarriers),
        v_ring(barriers(shared) + Ring<1>::kBarriers + Ring<kStages>::kBarriers) {}

  // The tiles whose turn it is.
  FASTATTN_DEVICE KVTile k() const { return {kv + k_ring.stage() * KVTile::kBytes}; }
  FASTATTN_DEVICE KVTile v() const { return {kv + (kStages + v_ring.stage()) * KVTile::kBytes}; }

 private:
  FASTATTN_DEVICE static uint64_t* barriers(unsigned char* shared) {
    return reinterpret_cast<uint64_t*>(shared + QTile::kBytes + 2 * kStages * KVTile::kBytes);
  }
};

// Copies what the consumers will multiply, tile by tile and block by block.
template <int kHeadDim, Scores kScores>
FASTATTN_DEVICE void produce(const AttnFwdSm90Launch& launch,
                             FwdSharedSm90<kHeadDim, kScores> shared) {
  using Shared = FwdSharedSm90<kHeadDim, kScores>;
  const AttnFwdParams& p = launch.fwd.params;
  const int items = static_cast<int>(launch.fwd.order.items());
#pragma unroll 1
  for (int round = 0; true; round++) {
    const int item = WorkOrder::nth_item(round, blockIdx.x, gridDim.x);
    if (item >= items) break;
    const QueryTile tile(p, launch.fwd.order, Shared::kTile.block_m(), Shared::kTile.block_n, item);
    if (tile.rows <= 0) continue;
    const int batch = p.cu_seqlens_q ? 0 : tile.batch;
    const int k_row = static_cast<int>(tile.sequence.k_row);
    shared.q.load(launch.q, shared.q_ring.acquire(Shared::QTile::kBytes), tile.q_row, tile.head,
                  batch);
    shared.q_ring.advance();
#pragma unroll 1
    for (int n_block = tile.n_block_end - 1; n_block >= tile.n_block_min; n_block--) {
      const int row = k_row + n_block * Shared::kTile.block_n;
      shared.k().load(launch.k, shared.k_ring.acquire(Shared::KVTile::kBytes), row, tile.head_k,
                      batch);
      shared.k_ring.advance();
      shared.v().load(launch.v, shared.v_ring.acquire(Shared::KVTile::kBytes), row, tile.head_k,
                      batch);
      shared.v_ring.advance();
    }
  }
}

// Consumers' turns at issuing products: each waits for the one before it and lets the next one go.
template <int kConsumers>
struct Turns {
  static constexpr int kThreads = 2 * kWarpgroupThreads;  // one waits, one comes
  int mine;                                               // named barrier 1 + consumer

  // The first one's first turn is let go by the last one.
  FASTATTN_DEVICE explicit Turns(int consumer) : mine(1 + consumer) {
    if (consumer == kConsumers - 1) ptx::bar_arrive(1, kThreads);
  }
  FASTATTN_DEVICE void wait() const { ptx::bar_sync(mine, kThreads); }
  FASTATTN_DEVICE void pass_on() const {
    ptx::bar_arrive(mine == kConsumers ? 1 : mine + 1, kThreads);
  }
};
// Everyone at any time.
struct NoTurns {
  FASTATTN_DEVICE explicit NoTurns(int) {}
  FASTATTN_DEVICE void wait() const {}
  FASTATTN_DEVICE void pass_on() const {}
};

template <class T, int kHeadDim, Scores kScores>
FASTATTN_DEVICE void consume(const AttnFwdLaunch& launch, FwdSharedSm90<kHeadDim, kScores> shared) {
  constexpr FwdTileSm90 kTile = fwd_tile_sm90(kHeadDim, kScores);
  constexpr int kBlockM = kTile.block_m(), kBlockN = kTile.block_n;
  constexpr int kN = kBlockN / 8, kD = kHeadDim / 8, kK = kBlockN / 16;
  const AttnFwdParams& p = launch.params;
  const int consumer = threadIdx.x / kWarpgroupThreads;
  const int consumer_row = consumer * kWarpgroupRows;  // in the tile
  const int warp_row = threadIdx.x / 32 * 16;
  const std::conditional_t<kHeadDim <= 128, Turns<kTile.consumers>, NoTurns> turn(consumer);

  const int items = static_cast<int>(launch.order.items());
  bool any_spoiled = false;
#pragma unroll 1
  for (int round = 0; true; round++) {
    const int item = WorkOrder::nth_item(round, blockIdx.x, gridDim.x);
    if (item >= items) break;
    const QueryTile tile(p, launch.order, kBlockM, kBlockN, item);
    if (tile.rows <= 0) continue;
    const KernelWindow window(tile.window);
    const int first_query = tile.first + consumer_row;
    const ScoreMods<T> mods(p, tile.sequence, tile.window, tile.head);
    OnlineSoftmax<1> softmax(kScores == Scores::kPlain ? p.scale * kLog2E : kLog2E);
    float out[1][kD][4], scores[1][kN][4], rescale[1][2];
    uint32_t weights[kK][4];
    clear(out);

    // Scores become weights, still in fp32.
    const auto weigh = [&](int n_block) {
      const int first_key = n_block * kBlockN;
      const Position at = thread_position(tile.first + warp_row, first_key);
      if constexpr (kScores == Scores::kRich) mods.apply(scores, at);
      if (!window.shows({first_query, first_query + kWarpgroupRows},
                        {first_key, first_key + kBlockN})) {
        hide_outside(scores, window, at);
      }
      softmax.weigh(scores, rescale);
      if constexpr (kScores == Scores::kRich) {
        if (p.seed) mods.drop(scores, at);
      }
    };

    shared.q_ring.wait();
    int n_block = tile.n_block_end - 1;
    if (n_block >= tile.n_block_min) {
      shared.k_ring.wait();
      ptx::wgmma_fence();
      issue_rows<T>(scores, shared.q, consumer_row, shared.k());
      ptx::wgmma_wait<0>();
      ptx::settle(scores[0]);
      shared.k_ring.release();
      weigh(n_block);
      pack_weights<T>(weights, scores);
#pragma unroll 1
      for (n_block--; n_block >= tile.n_block_min; n_block--) {
        shared.k_ring.wait();
        shared.v_ring.wait();
        turn.wait();
        ptx::wgmma_fence();
        issue_rows<T>(scores, shared.q, consumer_row, shared.k());
        issue_add<T>(out, weights, shared.v());
        turn.pass_on();
        ptx::wgmma_wait<1>();
        ptx::settle(scores[0]);
        shared.k_ring.release();
        weigh(n_block);
        ptx::wgmma_wait<0>();
        ptx::settle(out[0]);
        shared.v_ring.release();
        softmax.scale(out, rescale);
        pack_weights<T>(weights, scores);
      }
      shared.v_ring.wait();
      ptx::wgmma_fence();
      issue_add<T>(out, weights, shared.v());
      ptx::wgmma_wait<0>();
      ptx::settle(out[0]);
      shared.v_ring.release();
    }

    // The tile is found again, so that the loop keeps nothing of it in registers for this.
    const QueryTile same(p, launch.order, kBlockM, 1, ptx::anew(item));
    finish_rows(p, same, warp_row, softmax, out);
    any_spoiled |= spoiled_rows(p, out) != 0;
    T* out_rows = head_at<T>(p.out, p.out_stride, same.sequence.batch, same.q_row, same.head);
    store_out<T>(out, shared.q, warp_row, out_rows, p.out_stride.seq, same.rows,
                 static_cast<int>(p.head_dim_v), launch.out_aligned);
    ptx::fence_proxy_async();  // the next queries are copied to where the outputs passed through
    __syncwarp();
    shared.q_ring.release();
  }
  if (any_spoiled) repair_tiles<T, kBlockM>(launch, warp_row);
}

template <class T, int kHeadDim, Scores kScores>
static __global__ void __launch_bounds__(fwd_tile_sm90(kHeadDim, kScores).threads(), 1)
    attn_fwd_sm90_kernel(const __grid_constant__ AttnFwdSm90Launch launch) {
  constexpr FwdTileSm90 kTile = fwd_tile_sm90(kHeadDim, kScores);
  FASTATTN_SHARED(bytes);
  const FwdSharedSm90<kHeadDim, kScores> shared(bytes);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * kTile.consumers;
    shared.q_ring.init(kWarps);
    shared.k_ring.init(kWarps);
    shared.v_ring.init(kWarps);
    ptx::fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x < kTile.consumers * kWarpgroupThreads) {
    ptx::set_max_registers_up<kTile.consumer_registers()>();
    consume<T>(launch.fwd, shared);
  } else {
    ptx::set_max_registers_down<kTile.producer_registers()>();
    if (threadIdx.x % kWarpgroupThreads == 0) produce(launch, shared);
  }
}

template <class T, int kHeadDim, Scores kScores>
void launch_attn_fwd_sm90(const AttnFwdParams& p, const Device& device) {
  constexpr FwdTileSm90 kTile = fwd_tile_sm90(kHeadDim, kScores);
  static_assert(kTile.shared_bytes() <= kMostSharedSm90);
  AttnFwdSm90Launch params;
  params.fwd.params = p;
  params.fwd.order = make_work_order(p, kTile.block_m(), sizeof(T));
  params.fwd.qkv_aligned = true;
  params.fwd.out_aligned = rows_aligned<T>(p.out, p.out_stride, p.head_dim_v);
  params.q =
      tensor_map(mapped(p, p.q, p.q_stride, p.tokens_q, p.heads_q, p.head_dim, kTile.block_m()));
  params.k =
      tensor_map(mapped(p, p.k, p.k_stride, p.tokens_k, p.heads_k, p.head_dim, kTile.block_n));
  params.v =
      tensor_map(mapped(p, p.v, p.v_stride, p.tokens_k, p.heads_k, p.head_dim_v, kTile.block_n));
  // How long tiles of packed sequences take no order foresees: they go to SMs one by one, as these
  // get free. (Blocks that stay and count tiles would need a counter that is cleared before.)
  const int64_t items = params.fwd.order.items();
  const Grid grid{p.cu_seqlens_q ? items : lesser(items, device.multiprocessors), 1, 1,
                  kTile.threads(), kTile.shared_bytes()};
  launch(attn_fwd_sm90_kernel<T, kHeadDim, kScores>, grid, params, device, describe(p));
}

template <class T, int kHeadDim>
void launch_attn_fwd_sm90(const AttnFwdParams& p, const Device& device) {
  if (is_rich(p)) {
    launch_attn_fwd_sm90<T, kHeadDim, Scores::kRich>(p, device);
  } else {
    launch_attn_fwd_sm90<T, kHeadDim, Scores::kPlain>(p, device);
  }
}

template <class T>
void launch_attn_fwd_sm90(const AttnFwdParams& p, const Device& device) {
  const int64_t head_dim = greater(p.head_dim, p.head_dim_v);
  if (head_dim <= 64) return launch_attn_fwd_sm90<T, 64>(p, device);
  if (head_dim <= 96) return launch_attn_fwd_sm90<T, 96>(p, device);
  if (head_dim <= 128) return launch_attn_fwd_sm90<T, 128>(p, device);
  if (head_dim <= 192) return launch_attn_fwd_sm90<T, 192>(p, device);
  launch_attn_fwd_sm90<T, 256>(p, device);
}

}  // namespace fastattn::cuda
