// What a block of threads of Hopper's backward owns and is brought: its keys, its shared memory,
// and the queries that its producer warpgroup copies.
#pragma once

#include "attn_bwd.cuh"
#include "key_block.cuh"
#include "panel_tile.cuh"
#include "ring.cuh"
#include "tensor_map.h"
#include "tiles_sm90.cuh"

namespace fastattn::cuda {

struct AttnBwdSm90Launch {
  CUtensorMap q, k, v, dout, dq;  // dq: the sums
  AttnBwdLaunch bwd;
  uint32_t*
      turns;  // null, or (B, H_q, blocks of queries, dq_parts): blocks of keys that have added
};

// block_k keys of a KV head, and the blocks of queries that see them.
template <int kHeadDim>
struct KeyTile : KeyBlock {
  static constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);

  int n_block, m_block_min, m_block_end;

  FASTATTN_DEVICE KeyTile(const AttnFwdParams& p, const WorkOrder& order)
      : KeyBlock(p, order, kTile.block_k), n_block(first / kTile.block_k) {
    m_block_min = query_begin / kTile.block_q;
    m_block_end =
        query_begin < query_end ? (query_end + kTile.block_q - 1) / kTile.block_q : m_block_min;
  }

  // Of the blocks of keys that see this block of queries, how many come before this one.
  FASTATTN_DEVICE uint32_t turn(int m_block) const {
    const int64_t begin = int64_t{m_block} * kTile.block_q;
    const Range queries = intersect({begin, begin + kTile.block_q}, {0, sequence.seqlen_q});
    const int64_t last = (keys_seen_by_any(window, queries).end - 1) / kTile.block_k;
    return static_cast<uint32_t>(last - n_block);
  }
};

// The keys, found anew, so that the loop before keeps nothing of them in registers.
FASTATTN_DEVICE KeyBlock tile_again(const AttnBwdSm90Launch& launch, int block_k) {
  return {launch.bwd.params.fwd, launch.bwd.order, block_k, ptx::anew(blockIdx.x)};
}

template <int kHeadDim>
struct BwdSharedSm90 {
  static constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);
  using KTile = PanelTile<kTile.block_k, kHeadDim>;
  using QTile = PanelTile<kTile.block_q, kHeadDim>;
  using DSTile = PanelTile<kTile.block_k, kTile.block_q>;  // dSᵀ
  using DQTile = PanelTile<64, 128>;                       // 64 columns of fp32
  static constexpr int kStages = BwdTileSm90::kStages;

  unsigned char* bytes;
  Ring<1> k_ring;  // K and V
  Ring<kStages> q_ring, stats_ring;
  Ring<kTile.dout_stages> dout_ring;

  FASTATTN_DEVICE explicit BwdSharedSm90(unsigned char* shared)
      : bytes(shared),
        k_ring(barriers(shared)),
        q_ring(barriers(shared) + Ring<1>::kBarriers),
        stats_ring(barriers(shared) + Ring<1>::kBarriers + Ring<kStages>::kBarriers),
        dout_ring(barriers(shared) + Ring<1>::kBarriers + 2 * Ring<kStages>::kBarriers) {}

  FASTATTN_DEVICE KTile k() const { return {bytes}; }
  FASTATTN_DEVICE KTile v() const { return {bytes + KTile::kBytes}; }
  // Those whose turn it is.
  FASTATTN_DEVICE QTile q() const { return {bytes + kQ + q_ring.stage() * QTile::kBytes}; }
  FASTATTN_DEVICE QTile dout() const {
    return {bytes + kQ + (kStages + dout_ring.stage()) * QTile::kBytes};
  }
  // Written by one block of queries while products of the one before may still read the other.
  FASTATTN_DEVICE DSTile ds(int buffer) const { return {bytes + kDS + buffer * DSTile::kBytes}; }
  // A thread's fragment of scores, for the one with the same rows in the other consumer: 4 floats,
  // then those of the next thread.
  FASTATTN_DEVICE float4* scores() const {
    return reinterpret_cast<float4*>(bytes + kScores) + threadIdx.x % kWarpgroupThreads;
  }
  // lse of block_q queries, then their delta.
  FASTATTN_DEVICE float* stats() const {
    return reinterpret_cast<float*>(bytes + kStats) + stats_ring.stage() * 2 * kTile.block_q;
  }
  FASTATTN_DEVICE DQTile dq(int consumer) const {
    return {bytes + kDQ + consumer * DQTile::kBytes};
  }

 private:
  static constexpr int kQ = 2 * KTile::kBytes;
  static constexpr int kDS = kQ + (kStages + kTile.dout_stages) * QTile::kBytes;
  static constexpr int kDQ = kDS + kTile.ds_buffers() * DSTile::kBytes;
  static constexpr int kScores = kDQ + 2 * DQTile::kBytes;
  static constexpr int kStats = kScores + kTile.scores_bytes();
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
  const int k_row = static_cast<int>(tile.k_row);
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

}  // namespace fastattn::cuda
