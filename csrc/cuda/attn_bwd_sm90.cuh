// Gradients of softmax(scale·QKᵀ …)V with wgmma and TMA, for sm_90a and head dims up to 128 (Shah
// et al., "FlashAttention-3", 2024): S and P are computed once, five products in all.
//
// A block of threads keeps kBlockK keys of one KV head, and its producer warpgroup brings the
// queries that see them, of all query heads of the group, in blocks of block_q. Two consumer
// warpgroups own 64 keys each. Keys are the rows of their fragments, so that
//
//   Sᵀ = K·Qᵀ    dPᵀ = V·dOᵀ    Pᵀ and dSᵀ in registers    dV += Pᵀ·dO    dK += dSᵀ·Q
//
// take Pᵀ and dSᵀ from where they are. Only dQ = dS·K needs the keys of both: dSᵀ passes through
// shared memory, each consumer makes 64 × 64 of dQ, and TMA adds that to sums in fp32 in global
// memory, which a kernel at the end scales and rounds.
//
// Those sums come in no fixed order, unless the blocks of keys take turns at a block of queries
// (`turns`): the last keys first, which is also how the grid starts them.
#pragma once

#include "attn_bwd.cuh"
#include "products_sm90.cuh"
#include "ring.cuh"
#include "tensor_map.h"
#include "tiles_sm90.cuh"

namespace fastattn::cuda {

struct AttnBwdSm90Launch {
  CUtensorMap q, k, v, dout, dq;  // dq: the sums
  AttnBwdLaunch bwd;
  uint32_t*
      turns;  // null, or (B, H_q, blocks of queries, consumer): blocks of keys that have added
};

// kBlockK keys of a KV head, and the blocks of queries that see them.
template <int kHeadDim>
struct KeyTile {
  static constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);

  int batch, head;           // KV head
  int n_block, first, keys;  // keys ≤ 0: the sequence ends before
  int m_block_min, m_block_end;
  Sequence sequence;
  Window window;

  FASTATTN_DEVICE KeyTile(const AttnFwdParams& p, const WorkOrder& order) {
    const WorkOrder::Item work = order.item(blockIdx.x);
    sequence = sequence_at(p, work.batch);
    window = make_window(sequence.seqlen_q, sequence.seqlen_k, p.window_left, p.window_right);
    batch = work.batch;
    head = work.head;
    n_block = work.m_block;
    first = n_block * kTile.kBlockK;
    keys = min(kTile.kBlockK, static_cast<int>(sequence.seqlen_k) - first);
    const int seqlen_q = static_cast<int>(sequence.seqlen_q);
    const KernelWindow seen_by = KernelWindow(window).transposed(seqlen_q);
    const int begin = max(0, first + seen_by.first);
    const int end = min(seqlen_q, first + keys - 1 + seen_by.end);
    m_block_min = begin / kTile.block_q;
    m_block_end = begin < end ? (end + kTile.block_q - 1) / kTile.block_q : m_block_min;
  }

  // Of the blocks of keys that see this block of queries, how many come before this one.
  FASTATTN_DEVICE uint32_t turn(int m_block) const {
    const int64_t begin = int64_t{m_block} * kTile.block_q;
    const Range queries = intersect({begin, begin + kTile.block_q}, {0, sequence.seqlen_q});
    const int64_t last = (keys_seen_by_any(window, queries).end - 1) / kTile.kBlockK;
    return static_cast<uint32_t>(last - n_block);
  }
};

template <int kHeadDim>
struct BwdSharedSm90 {
  static constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);
  using KTile = PanelTile<kTile.kBlockK, kHeadDim>;
  using QTile = PanelTile<kTile.block_q, kHeadDim>;
  using DSTile = PanelTile<kTile.kBlockK, kTile.block_q>;  // dSᵀ
  using DQTile = PanelTile<64, 128>;                       // 64 columns of fp32
  static constexpr int kStages = BwdTileSm90::kStages;

  unsigned char* bytes;
  Ring<1> k_ring;  // K and V
  Ring<kStages> q_ring, dout_ring, stats_ring;

  FASTATTN_DEVICE explicit BwdSharedSm90(unsigned char* shared)
      : bytes(shared),
        k_ring(barriers(shared)),
        q_ring(barriers(shared) + Ring<1>::kBarriers),
        dout_ring(barriers(shared) + Ring<1>::kBarriers + Ring<kStages>::kBarriers),
        stats_ring(barriers(shared) + Ring<1>::kBarriers + 2 * Ring<kStages>::kBarriers) {}

  FASTATTN_DEVICE KTile k() const { return {bytes}; }
  FASTATTN_DEVICE KTile v() const { return {bytes + KTile::kBytes}; }
  // Those whose turn it is.
  FASTATTN_DEVICE QTile q() const { return {bytes + kQ + q_ring.stage() * QTile::kBytes}; }
  FASTATTN_DEVICE QTile dout() const {
    return {bytes + kQ + (kStages + dout_ring.stage()) * QTile::kBytes};
  }
  // Written by one block of queries while products of the one before may still read the other.
  FASTATTN_DEVICE DSTile ds(int buffer) const { return {bytes + kDS + buffer * DSTile::kBytes}; }
  // lse of block_q queries, then their delta.
  FASTATTN_DEVICE float* stats() const {
    return reinterpret_cast<float*>(bytes + kStats) + stats_ring.stage() * 2 * kTile.block_q;
  }
  FASTATTN_DEVICE DQTile dq(int consumer) const {
    return {bytes + kDQ + consumer * DQTile::kBytes};
  }

 private:
  static constexpr int kQ = 2 * KTile::kBytes, kDS = kQ + 2 * kStages * QTile::kBytes;
  static constexpr int kDQ = kDS + 2 * DSTile::kBytes, kStats = kDQ + 2 * DQTile::kBytes;
  static constexpr int kBarriers = kStats + kStages * 2 * kTile.block_q * 4;
  static_assert(kTile.shared_bytes() == kBarriers + 8 * kTile.barriers());

  FASTATTN_DEVICE static uint64_t* barriers(unsigned char* shared) {
    return reinterpret_cast<uint64_t*>(shared + kBarriers);
  }
};

template <int kHeadDim>
FASTATTN_DEVICE void produce_queries(const AttnBwdSm90Launch& launch, const KeyTile<kHeadDim>& tile,
                                     BwdSharedSm90<kHeadDim> shared) {
  using Shared = BwdSharedSm90<kHeadDim>;
  const AttnFwdParams& p = launch.bwd.params.fwd;
  const int batch = p.cu_seqlens_q ? 0 : tile.batch;
  const int k_row = static_cast<int>(tile.sequence.k_row) + tile.first;
  const int q_row = static_cast<int>(tile.sequence.q_row);
  uint64_t* keys_there = shared.k_ring.acquire(2 * Shared::KTile::kBytes);
  shared.k().load(launch.k, keys_there, k_row, tile.head, batch);
  shared.v().load(launch.v, keys_there, k_row, tile.head, batch);
  const int group_size = launch.bwd.order.group_size;
#pragma unroll 1
  for (int head = tile.head * group_size; head < (tile.head + 1) * group_size; head++) {
#pragma unroll 1
    for (int m_block = tile.m_block_min; m_block < tile.m_block_end; m_block++) {
      const int row = q_row + m_block * Shared::kTile.block_q;
      shared.q().load(launch.q, shared.q_ring.acquire(Shared::QTile::kBytes), row, head, batch);
      shared.q_ring.advance();
      shared.dout().load(launch.dout, shared.dout_ring.acquire(Shared::QTile::kBytes), row, head,
                         batch);
      shared.dout_ring.advance();
    }
  }
}

// The same for lse and delta, by a warp: a query that is not there has P = 0 by an lse of +inf.
template <int kHeadDim>
FASTATTN_DEVICE void produce_stats(const AttnBwdSm90Launch& launch, const KeyTile<kHeadDim>& tile,
                                   BwdSharedSm90<kHeadDim> shared) {
  constexpr int kBlockQ = bwd_tile_sm90(kHeadDim).block_q;
  const AttnFwdParams& p = launch.bwd.params.fwd;
  const int group_size = launch.bwd.order.group_size;
  const int seqlen_q = static_cast<int>(tile.sequence.seqlen_q);
#pragma unroll 1
  for (int head = tile.head * group_size; head < (tile.head + 1) * group_size; head++) {
    const int64_t head_row = (int64_t{tile.batch} * p.heads_q + head) * p.seqlen_q;
#pragma unroll 1
    for (int m_block = tile.m_block_min; m_block < tile.m_block_end; m_block++) {
      shared.stats_ring.wait_free();
      float* stats = shared.stats();
#pragma unroll
      for (int i = threadIdx.x % 32; i < kBlockQ; i += 32) {
        const float2 lse_delta = stats_at(launch.bwd.lse + head_row, launch.bwd.delta + head_row,
                                          m_block * kBlockQ + i, seqlen_q);
        stats[i] = lse_delta.x;
        stats[kBlockQ + i] = lse_delta.y;
      }
      shared.stats_ring.publish();
    }
  }
}

// Named barriers: of both consumers, and one each.
constexpr int kBothConsumers = 1, kOneConsumer = 2;

// Rows [count, …) become zeros: of a packed tensor they are the next sequence's, and its NaN must
// not meet our zeros. By all consumers, who meet behind it.
template <class Tile>
FASTATTN_DEVICE void clear_rows(const Tile& tile, int count) {
  constexpr int kChunks = Tile::kPanels * Tile::kGroup, kThreads = BwdTileSm90::kConsumerThreads;
#pragma unroll 1
  for (int i = max(count, 0) * kChunks + threadIdx.x; i < Tile::kRows * kChunks; i += kThreads) {
    *reinterpret_cast<uint4*>(tile.chunk(i / kChunks, i % kChunks)) = make_uint4(0, 0, 0, 0);
  }
}
FASTATTN_DEVICE void meet_consumers() {
  ptx::fence_proxy_async();
  ptx::bar_sync(kBothConsumers, BwdTileSm90::kConsumerThreads);
}

// Rows from `end` on, of which `row` is this thread's first: keys that are not there have zeros for
// K, but what scores they get must not overflow.
template <int kN>
FASTATTN_DEVICE void fill_behind(float (&scores)[1][kN][4], int row, int end, float value) {
  for_each_element(scores, [&](float& s, int, int, int half, int) {
    if (row + 8 * half >= end) s = value;
  });
}

// Pᵀ and dSᵀ before scale, of scores that are plain: from raw products and dPᵀ, with lse and delta
// from this thread's first column on.
template <int kN>
FASTATTN_DEVICE void plain_weights(float (&weights)[1][kN][4], float scale_log2, const float* lse) {
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const float2 columns = *reinterpret_cast<const float2*>(lse + 8 * n);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float* weight = &weights[0][n][2 * half];
      weight[0] = ptx::ex2(weight[0] * scale_log2 - columns.x * kLog2E);
      weight[1] = ptx::ex2(weight[1] * scale_log2 - columns.y * kLog2E);
    }
  }
}
// A weight of 0 keeps NaN behind.
template <int kN>
FASTATTN_DEVICE void plain_gradients(const float (&weights)[1][kN][4], float (&dweights)[1][kN][4],
                                     const float* delta) {
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const float2 columns = *reinterpret_cast<const float2*>(delta + 8 * n);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float* weight = &weights[0][n][2 * half];
      float* dweight = &dweights[0][n][2 * half];
      dweight[0] = weight[0] == 0.0f ? 0.0f : weight[0] * (dweight[0] - columns.x);
      dweight[1] = weight[1] == 0.0f ? 0.0f : weight[1] * (dweight[1] - columns.y);
    }
  }
}

// Those of any scores, 8 queries at a time: what they need between takes registers.
template <class Gradients, int kN, class Stats>
FASTATTN_DEVICE void apply_in_parts(const Gradients& gradients, float (&weights)[1][kN][4],
                                    float (&dweights)[1][kN][4], const KernelWindow& window,
                                    bool inside, Position at, const Stats& stats) {
#pragma unroll
  for (int n = 0; n < kN; n++) {
    float part[1][1][4], dpart[1][1][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      part[0][0][i] = weights[0][n][i];
      dpart[0][0][i] = dweights[0][n][i];
    }
    gradients.apply(part, dpart, window, inside, {at.row, at.column + 8 * n},
                    [&](int, int half, int e) { return stats(n, half, e); });
#pragma unroll
    for (int i = 0; i < 4; i++) {
      weights[0][n][i] = part[0][0][i];
      dweights[0][n][i] = dpart[0][0][i];
    }
  }
}

// 64 × 64 of dQ on its way to the sums, by one consumer. `add` is called by one of its threads.
template <class DQTile, class Add>
FASTATTN_DEVICE void add_dq(const float (&dq)[1][8][4], const DQTile& sDQ, int consumer,
                            const Add& add) {
  const int thread = threadIdx.x % kWarpgroupThreads, lane = thread % 32;
  if (thread == 0) ptx::bulk_wait_read<0>();  // the ones before have left
  ptx::bar_sync(kOneConsumer + consumer, kWarpgroupThreads);
#pragma unroll
  for (int n = 0; n < 8; n++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned char* chunk =
          sDQ.chunk(thread / 32 * 16 + lane / 4 + 8 * half, 2 * n + lane % 4 / 2);
      *(reinterpret_cast<float2*>(chunk) + lane % 2) =
          make_float2(dq[0][n][2 * half], dq[0][n][2 * half + 1]);
    }
  }
  ptx::fence_proxy_async();
  ptx::bar_sync(kOneConsumer + consumer, kWarpgroupThreads);
  if (thread == 0) add();
}

template <class T, int kHeadDim, Scores kScores>
FASTATTN_DEVICE void consume_queries(const AttnBwdSm90Launch& launch, const KeyTile<kHeadDim>& tile,
                                     BwdSharedSm90<kHeadDim> shared) {
  constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);
  constexpr int kBlockQ = kTile.block_q, kN = kBlockQ / 8, kD = kHeadDim / 8;
  const AttnBwdParams& b = launch.bwd.params;
  const AttnFwdParams& p = b.fwd;
  const Sequence& s = tile.sequence;
  const int seqlen_q = static_cast<int>(s.seqlen_q), seqlen_k = static_cast<int>(s.seqlen_k);
  const int consumer = threadIdx.x / kWarpgroupThreads, consumer_row = kWarpgroupRows * consumer;
  const int warp_row = threadIdx.x / 32 * 16, first_key = tile.first + consumer_row;
  const KernelWindow seen_by = KernelWindow(tile.window).transposed(seqlen_q);
  // The part of dQ: 64 queries, or 64 columns.
  const int dq_rows = kBlockQ == 128 ? consumer : 0, dq_columns = kBlockQ == 128 ? 0 : consumer;
  const int group_size = launch.bwd.order.group_size;

  float dk[1][kD][4], dv[1][kD][4];
  clear(dk);
  clear(dv);
  shared.k_ring.wait();
  if (p.cu_seqlens_q && tile.keys < kTile.kBlockK) {
    clear_rows(shared.k(), tile.keys);
    meet_consumers();
  }
  int buffer = 0;
#pragma unroll 1
  for (int head = tile.head * group_size; head < (tile.head + 1) * group_size; head++) {
    const Gradients<T, Rows::kKeys, true> gradients(b, s, tile.window, head);
#pragma unroll 1
    for (int m_block = tile.m_block_min; m_block < tile.m_block_end; m_block++) {
      const int query = m_block * kBlockQ;
      const Position at = thread_position(tile.first + warp_row, query);
      const float* lane_stats = shared.stats() + threadIdx.x % 4 * 2;
      const bool inside =
          first_key + kWarpgroupRows <= seqlen_k &&
          seen_by.shows({first_key, first_key + kWarpgroupRows}, {query, query + kBlockQ});
      float weights[1][kN][4], dweights[1][kN][4];
      shared.q_ring.wait();
      shared.dout_ring.wait();
      shared.stats_ring.wait();
      if (p.cu_seqlens_q && query + kBlockQ > seqlen_q) {
        clear_rows(shared.q(), seqlen_q - query);
        clear_rows(shared.dout(), seqlen_q - query);
        meet_consumers();
      }
      ptx::wgmma_fence();
      issue_rows<T>(weights, shared.k(), consumer_row, shared.q());
      issue_rows<T>(dweights, shared.v(), consumer_row, shared.dout());
      if constexpr (kScores == Scores::kPlain) {
        ptx::wgmma_wait<1>();
        ptx::settle(weights[0]);
        if (!inside) {
          hide_outside(weights, seen_by, at);
          fill_behind(weights, at.row, seqlen_k, -INFINITY);
        }
        plain_weights(weights, p.scale * kLog2E, lane_stats);
        ptx::wgmma_wait<0>();
        ptx::settle(dweights[0]);
        plain_gradients(weights, dweights, lane_stats + kBlockQ);
      } else {
        ptx::wgmma_wait<0>();
        ptx::settle(weights[0]);
        ptx::settle(dweights[0]);
        const auto stats = [&](int n, int, int e) {
          return make_float2(lane_stats[8 * n + e], lane_stats[kBlockQ + 8 * n + e]);
        };
        apply_in_parts(gradients, weights, dweights, seen_by, inside, at, stats);
        if (!inside) {
          fill_behind(weights, at.row, seqlen_k, 0.0f);
          fill_behind(dweights, at.row, seqlen_k, 0.0f);
        }
      }
      __syncwarp();
      shared.stats_ring.release();
      uint32_t packed[kN / 2][4], dpacked[kN / 2][4];
      pack_weights<T>(packed, weights);
      pack_weights<T>(dpacked, dweights);

      const auto sDS = shared.ds(buffer);
      buffer ^= 1;
#pragma unroll
      for (int n = 0; n < kN; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          unsigned char* chunk = sDS.chunk(warp_row + threadIdx.x % 32 / 4 + 8 * half, n);
          reinterpret_cast<uint32_t*>(chunk)[threadIdx.x % 4] = dpacked[n / 2][n % 2 * 2 + half];
        }
      }
      meet_consumers();  // dSᵀ is there, and nobody reads the other buffer any more
      float dq[1][8][4];
      ptx::wgmma_fence();
      issue_columns<T>(dq, sDS, dq_rows, shared.k(), dq_columns);
      issue_add<T>(dv, packed, shared.dout());
      issue_add<T>(dk, dpacked, shared.q());
      ptx::wgmma_wait<2>();
      ptx::settle(dq[0]);
      add_dq(dq, shared.dq(consumer), consumer, [&] {
        uint32_t* turns = launch.turns;
        if (turns) {
          const int m_blocks = static_cast<int>(ceil_div(p.seqlen_q, kBlockQ));
          turns += ((int64_t{tile.batch} * p.heads_q + head) * m_blocks + m_block) * 2 + consumer;
          const uint32_t mine = tile.turn(m_block);
          while (*static_cast<volatile uint32_t*>(turns) != mine) __nanosleep(64);
          __threadfence();
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          ptx::tma_reduce_add(&launch.dq, shared.dq(consumer).bytes + i * 64 * 128,
                              64 * dq_columns + 32 * i,
                              static_cast<int>(s.q_row) + query + 64 * dq_rows, head,
                              p.cu_seqlens_q ? 0 : tile.batch);
        }
        ptx::bulk_commit();
        if (turns) {
          ptx::bulk_wait<0>();  // in global memory, not only out of shared memory
          __threadfence();
          atomicAdd(turns, 1u);
        }
      });
      ptx::wgmma_wait<0>();
      ptx::settle(dk[0]);
      ptx::settle(dv[0]);
      shared.dout_ring.release();
      shared.q_ring.release();
    }
  }
  if (threadIdx.x % kWarpgroupThreads == 0) ptx::bulk_wait_read<0>();

  const int64_t k_row = s.k_row + tile.first;
  store_gradient(dk, head_at<T>(b.dk, b.dk_stride, s.batch, k_row, tile.head), b.dk_stride.seq,
                 warp_row, tile.keys, static_cast<int>(p.head_dim), p.scale);
  store_gradient(dv, head_at<T>(b.dv, b.dv_stride, s.batch, k_row, tile.head), b.dv_stride.seq,
                 warp_row, tile.keys, static_cast<int>(p.head_dim_v), 1.0f);
}

template <class T, int kHeadDim, Scores kScores>
__global__ void __launch_bounds__(BwdTileSm90::kThreads, 1)
    attn_bwd_sm90_kernel(const __grid_constant__ AttnBwdSm90Launch launch) {
  const KeyTile<kHeadDim> tile(launch.bwd.params.fwd, launch.bwd.order);
  if (tile.keys <= 0) return;
  FASTATTN_SHARED(bytes);
  const BwdSharedSm90<kHeadDim> shared(bytes);
  if (threadIdx.x == 0) {
    constexpr int kWarps = BwdTileSm90::kConsumerThreads / 32;
    shared.k_ring.init(kWarps);
    shared.q_ring.init(kWarps);
    shared.dout_ring.init(kWarps);
    shared.stats_ring.init(kWarps);
    ptx::fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x < BwdTileSm90::kConsumerThreads) {
    ptx::set_max_registers_up<240>();
    consume_queries<T, kHeadDim, kScores>(launch, tile, shared);
  } else {
    ptx::set_max_registers_down<24>();
    constexpr int kFirst = BwdTileSm90::kConsumerThreads;
    if (threadIdx.x == kFirst) produce_queries(launch, tile, shared);
    if (threadIdx.x / 32 == kFirst / 32 + 1) produce_stats(launch, tile, shared);
  }
}

struct ClearLaunch {
  uint32_t* memory;
  int64_t words;
};

// Zeros, for sums and turns.
static __global__ void __launch_bounds__(256)
    attn_bwd_clear_kernel(const __grid_constant__ ClearLaunch launch) {
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < launch.words;
       i += int64_t{gridDim.x} * 256) {
    launch.memory[i] = 0;
  }
}

struct DQStoreLaunch {
  AttnBwdParams params;
  const float* sums;
  int columns;
};

// dQ of the sums, a warp to a row. Grid: rows, heads, batch.
template <class T>
__global__ void __launch_bounds__(128)
    attn_bwd_dq_store_kernel(const __grid_constant__ DQStoreLaunch launch) {
  const AttnBwdParams& b = launch.params;
  const AttnFwdParams& p = b.fwd;
  const int head = blockIdx.y, batch = blockIdx.z, query = blockIdx.x * 4 + threadIdx.x / 32;
  const Sequence s = sequence_at(p, batch);
  if (query >= s.seqlen_q) return;
  const int64_t row = s.q_row + query, first = p.cu_seqlens_q ? 0 : batch;
  const float* sums =
      launch.sums + ((first * p.heads_q + head) * p.tokens_q + row) * launch.columns;
  T* dq = head_at<T>(b.dq, b.dq_stride, s.batch, row, head);
  for (int d = threadIdx.x % 32; d < p.head_dim; d += 32) store_element(dq + d, sums[d] * p.scale);
}

// What of a problem's workspace is whose. lse and delta: (B, H_q, S_q); sums: (B, H_q, S_q,
// columns) or, packed, (H_q, T_q, columns); all but the turns in fp32.
struct BwdWorkspaceSm90 {
  int64_t rows, sums, turns;  // words
  int columns;

  explicit BwdWorkspaceSm90(const AttnBwdParams& b) {
    const AttnFwdParams& p = b.fwd;
    columns = greater(p.head_dim, p.head_dim_v) <= 64 ? 64 : 128;
    rows = round_up(p.batch * p.heads_q * p.seqlen_q, 32);  // 128 bytes, for TMA
    sums = (p.cu_seqlens_q ? 1 : p.batch) * p.heads_q * p.tokens_q * columns;
    const int64_t m_blocks = ceil_div(p.seqlen_q, bwd_tile_sm90(columns).block_q);
    turns = b.deterministic ? p.batch * p.heads_q * m_blocks * 2 : 0;
  }
  int64_t bytes() const { return 4 * (2 * rows + sums + turns); }
};

template <class T, int kHeadDim>
void launch_attn_bwd_sm90(const AttnBwdParams& b, void* workspace, const Device& device) {
  constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);
  static_assert(kTile.shared_bytes() <= kMostSharedSm90);
  const AttnFwdParams& p = b.fwd;
  const BwdWorkspaceSm90 space(b);
  auto* const lse = static_cast<float*>(workspace);
  float* const sums = lse + 2 * space.rows;
  auto* const turns = reinterpret_cast<uint32_t*>(sums + space.sums);
  AttnBwdSm90Launch params{};
  params.bwd.params = b;
  params.bwd.lse = lse;
  params.bwd.delta = lse + space.rows;
  params.bwd.order = make_key_order(p, kTile.kBlockK, sizeof(T));
  params.turns = b.deterministic ? turns : nullptr;
  const auto mapped_q = [&](const void* data, const Strides& stride, int64_t cols) {
    return tensor_map(mapped(p, data, stride, p.tokens_q, p.heads_q, cols, kTile.block_q));
  };
  const auto mapped_k = [&](const void* data, const Strides& stride, int64_t cols) {
    return tensor_map(mapped(p, data, stride, p.tokens_k, p.heads_k, cols, kTile.kBlockK));
  };
  params.q = mapped_q(p.q, p.q_stride, p.head_dim);
  params.dout = mapped_q(b.dout, b.dout_stride, p.head_dim_v);
  params.k = mapped_k(p.k, p.k_stride, p.head_dim);
  params.v = mapped_k(p.v, p.v_stride, p.head_dim_v);
  const Strides sums_stride{p.heads_q * p.tokens_q * kHeadDim, kHeadDim, p.tokens_q * kHeadDim};
  MappedTensor mapped_sums = mapped(p, sums, sums_stride, p.tokens_q, p.heads_q, kHeadDim, 64);
  mapped_sums.dtype = DType::kF32;
  params.dq = tensor_map(mapped_sums);

  const std::string shape = describe(p);
  const Grid rows{ceil_div(p.seqlen_q, 4), p.heads_q, p.batch, 128};
  launch(attn_bwd_prep_kernel<T>, rows, params.bwd, device, "attn_bwd_prep of " + shape);
  if (b.dsinks) {
    launch(attn_bwd_dsinks_kernel, {p.heads_q, 1, 1, 32}, params.bwd, device,
           "attn_bwd_dsinks of " + shape);
  }
  const ClearLaunch clear{reinterpret_cast<uint32_t*>(sums), space.sums + space.turns};
  launch(attn_bwd_clear_kernel,
         {lesser(ceil_div(clear.words, 256), 8 * device.multiprocessors), 1, 1, 256}, clear, device,
         "attn_bwd_clear of " + shape);
  const Grid grid{params.bwd.order.items(), 1, 1, kTile.kThreads, kTile.shared_bytes()};
  if (is_rich(p)) {
    launch(attn_bwd_sm90_kernel<T, kHeadDim, Scores::kRich>, grid, params, device,
           "attn_bwd of " + shape);
  } else {
    launch(attn_bwd_sm90_kernel<T, kHeadDim, Scores::kPlain>, grid, params, device,
           "attn_bwd of " + shape);
  }
  const DQStoreLaunch store{b, sums, kHeadDim};
  launch(attn_bwd_dq_store_kernel<T>, rows, store, device, "attn_bwd_dq_store of " + shape);
}

}  // namespace fastattn::cuda
