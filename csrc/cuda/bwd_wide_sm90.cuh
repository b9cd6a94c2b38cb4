// Consumers of Hopper's backward beyond head dim 128, where dK and dV of 64 keys fill the registers
// of one warpgroup each. They share the keys, and the work on a block of queries:
//
//   the one of dV   Sᵀ = K·Qᵀ     Pᵀ, which it hands over   dV += Pᵀ·dO    half the parts of dQ
//   the one of dK   dPᵀ = V·dOᵀ   dSᵀ, to shared memory     dK += dSᵀ·Q    the other half
//
// Plain weights are handed over in fp32, and Sᵀ of the next block is issued before dSᵀ of this one
// is there, so that the next weights are made beside the other's products. Rich scores are handed
// over as the product left them, and both do what is to be done with them: they take longer than
// products anyway, and ptxas serialises a product that is issued so far ahead of them.
#pragma once

#include "bwd_steps_sm90.cuh"
#include "products_sm90.cuh"

namespace fastattn::cuda {

// Each 256 threads: one consumer comes, the other waits.
constexpr int kScoresThere = 4, kDSThere = 5;

template <int kN>
FASTATTN_DEVICE void give_scores(const float (&scores)[1][kN][4], float4* to) {
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const float* s = scores[0][n];
    to[n * kWarpgroupThreads] = make_float4(s[0], s[1], s[2], s[3]);
  }
  ptx::bar_arrive(kScoresThere, BwdTileSm90::kConsumerThreads);
}
template <int kN>
FASTATTN_DEVICE void take_scores(float (&scores)[1][kN][4], const float4* from) {
  ptx::bar_sync(kScoresThere, BwdTileSm90::kConsumerThreads);
#pragma unroll
  for (int n = 0; n < kN; n++) {
    const float4 s = from[n * kWarpgroupThreads];
    scores[0][n][0] = s.x;
    scores[0][n][1] = s.y;
    scores[0][n][2] = s.z;
    scores[0][n][3] = s.w;
  }
}

// What both have of a block of queries.
template <int kHeadDim>
struct WideBlock {
  static constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);
  static constexpr int kBlockQ = kTile.block_q, kN = kBlockQ / 8, kD = kHeadDim / 8;

  const AttnBwdSm90Launch& launch;
  const KeyTile<kHeadDim>& tile;
  const int seqlen_q, seqlen_k, warp_row;  // in the tile
  const KernelWindow seen_by;
  int head, m_block, left;  // blocks that are not done

  FASTATTN_DEVICE WideBlock(const AttnBwdSm90Launch& launch, const KeyTile<kHeadDim>& tile)
      : launch(launch),
        tile(tile),
        seqlen_q(static_cast<int>(tile.sequence.seqlen_q)),
        seqlen_k(static_cast<int>(tile.sequence.seqlen_k)),
        warp_row(threadIdx.x % kWarpgroupThreads / 32 * 16),
        seen_by(KernelWindow(tile.window).transposed(seqlen_q)),
        head(tile.head * launch.bwd.order.group_size),
        m_block(tile.m_block_min),
        left(launch.bwd.order.group_size * (tile.m_block_end - tile.m_block_min)) {}

  FASTATTN_DEVICE void advance() {
    left--;
    if (++m_block == tile.m_block_end) {
      m_block = tile.m_block_min;
      head++;
    }
  }
  FASTATTN_DEVICE int query() const { return m_block * kBlockQ; }
  FASTATTN_DEVICE Position position() const {
    return thread_position(tile.first + warp_row, query());
  }
  // Whether all keys are there, and seen by all queries.
  FASTATTN_DEVICE bool inside() const {
    return tile.keys == kTile.block_k &&
           seen_by.shows({tile.first, tile.first + kTile.block_k}, {query(), query() + kBlockQ});
  }
  // Whether rows behind the last query are the next sequence's.
  FASTATTN_DEVICE bool has_neighbours() const {
    return launch.bwd.params.fwd.cu_seqlens_q && query() + kBlockQ > seqlen_q;
  }

  // Weights and their gradients from scores and dPᵀ, where scores are rich.
  template <class T, bool kAddsBias>
  FASTATTN_DEVICE void apply(float (&weights)[1][kN][4], float (&dweights)[1][kN][4],
                             const float* lane_stats) const {
    const Gradients<T, Rows::kKeys, kAddsBias> gradients(launch.bwd.params, tile.sequence,
                                                         tile.window, head);
    const bool all = inside();
    const Position at = position();
    gradients.template apply<1>(weights, dweights, seen_by, all, at, [&](int n, int, int e) {
      return make_float2(lane_stats[8 * n + e], lane_stats[kBlockQ + 8 * n + e]);
    });
    if (!all) {
      fill_behind(weights, at.row, seqlen_k, 0.0f);
      fill_behind(dweights, at.row, seqlen_k, 0.0f);
    }
  }

  // sums += weights · B, beside this consumer's parts of dQ.
  template <class T, int kConsumer, class BTile>
  FASTATTN_DEVICE void multiply(float (&sums)[1][kD][4], const uint32_t (&weights)[kN / 2][4],
                                const BTile& b, const BwdSharedSm90<kHeadDim>& shared) const {
    float dq[1][8][4];
#pragma unroll
    for (int i = kConsumer; i < kTile.dq_parts(); i += 2) {
      const DQPart part = dq_part(kBlockQ, i);
      ptx::wgmma_fence();
      issue_columns<T>(dq, shared.ds(0), part.rows, shared.k(), part.columns);
      if (i == kConsumer) {
        issue_add<T>(sums, weights, b);
        ptx::wgmma_wait<1>();
      } else {
        ptx::wgmma_wait<0>();
      }
      ptx::settle(dq[0]);
      stage_dq(dq, shared.dq(kConsumer), kConsumer);
      if (threadIdx.x % kWarpgroupThreads == 0) {
        add_dq(launch, tile, head, m_block, i, shared.dq(kConsumer).bytes);
      }
    }
    ptx::wgmma_wait<0>();
    ptx::settle(sums[0]);
  }
};

template <class T, int kHeadDim, Scores kScores>
FASTATTN_DEVICE void consume_for_dv(const AttnBwdSm90Launch& launch, const KeyTile<kHeadDim>& tile,
                                    BwdSharedSm90<kHeadDim> shared) {
  using Block = WideBlock<kHeadDim>;
  constexpr int kN = Block::kN;
  const AttnBwdParams& b = launch.bwd.params;
  const AttnFwdParams& p = b.fwd;
  Block block(launch, tile);
  float dv[1][Block::kD][4], scores[1][kN][4];
  clear(dv);
  constexpr bool kAhead = kScores == Scores::kPlain;
  const auto issue_scores = [&] {
    shared.q_ring.wait();
    ptx::wgmma_fence();
    issue_rows<T>(scores, shared.k(), 0, shared.q());
  };
  const auto multiply_scores = [&] {
    issue_scores();
    ptx::wgmma_wait<0>();
    ptx::settle(scores[0]);
  };
  if (kAhead && block.left > 0) multiply_scores();
#pragma unroll 1
  for (; block.left > 0; block.advance()) {
    if constexpr (!kAhead) multiply_scores();
    shared.q_ring.release();
    shared.stats_ring.wait();
    const float* lane_stats = shared.stats() + threadIdx.x % 4 * 2;
    if constexpr (kScores == Scores::kPlain) {
      if (!block.inside()) {
        const Position at = block.position();
        hide_outside(scores, block.seen_by, at);
        fill_behind(scores, at.row, block.seqlen_k, -INFINITY);
      }
      plain_weights(scores, p.scale * kLog2E, lane_stats);
      give_scores(scores, shared.scores());
    } else {
      give_scores(scores, shared.scores());
      float unused[1][kN][4] = {};
      block.template apply<T, false>(scores, unused, lane_stats);
      __syncwarp();
    }
    shared.stats_ring.release();  // or, where plain, when the other has seen that all lanes came
    uint32_t weights[kN / 2][4];
    pack_weights<T>(weights, scores);
    if (kAhead && block.left > 1) issue_scores();

    shared.dout_ring.wait();
    ptx::bar_sync(kDSThere, BwdTileSm90::kConsumerThreads);
    if (block.has_neighbours()) {
      clear_rows<kWarpgroupThreads>(shared.dout(), block.seqlen_q - block.query());
      meet_warpgroup(0);
    }
    block.template multiply<T, 0>(dv, weights, shared.dout(), shared);
    ptx::settle(scores[0]);
    shared.dout_ring.release();
  }
  const uint32_t spoiled = spoiled_rows(p, dv);
  // Through a buffer of dO: with the last part of dQ all have met since they multiplied by it.
  const KeyBlock same = tile_again(launch, Block::kTile.block_k);
  store_gradient(dv, shared.dout(), block.warp_row,
                 head_at<T>(b.dv, b.dv_stride, same.sequence.batch, same.k_row, same.head),
                 b.dv_stride.seq, same.keys, p.head_dim_v, 1.0f, launch.bwd.grads_aligned);
  if (spoiled != 0) {
    repair_dkv<T, Block::kTile.block_k, false, true>(launch.bwd, block.warp_row, spoiled);
  }
}

template <class T, int kHeadDim, Scores kScores>
FASTATTN_DEVICE void consume_for_dk(const AttnBwdSm90Launch& launch, const KeyTile<kHeadDim>& tile,
                                    BwdSharedSm90<kHeadDim> shared) {
  using Block = WideBlock<kHeadDim>;
  constexpr int kN = Block::kN;
  const AttnBwdParams& b = launch.bwd.params;
  Block block(launch, tile);
  float dk[1][Block::kD][4];
  clear(dk);
#pragma unroll 1
  for (; block.left > 0; block.advance()) {
    float weights[1][kN][4], dweights[1][kN][4];
    shared.dout_ring.wait();
    ptx::wgmma_fence();
    issue_rows<T>(dweights, shared.v(), 0, shared.dout());
    take_scores(weights, shared.scores());
    ptx::wgmma_wait<0>();
    ptx::settle(dweights[0]);
    shared.dout_ring.release();
    shared.stats_ring.wait();
    const float* lane_stats = shared.stats() + threadIdx.x % 4 * 2;
    if constexpr (kScores == Scores::kPlain) {
      plain_gradients(weights, dweights, lane_stats + Block::kBlockQ);
    } else {
      block.template apply<T, true>(weights, dweights, lane_stats);
    }
    __syncwarp();
    shared.stats_ring.release();
    uint32_t dpacked[kN / 2][4];
    pack_weights<T>(dpacked, dweights);
    store_ds(dpacked, shared.ds(0), block.warp_row);

    shared.q_ring.wait();
    if (block.has_neighbours()) {
      clear_rows<kWarpgroupThreads>(shared.q(), block.seqlen_q - block.query());
    }
    meet_warpgroup(1);
    ptx::bar_arrive(kDSThere, BwdTileSm90::kConsumerThreads);
    block.template multiply<T, 1>(dk, dpacked, shared.q(), shared);
    shared.q_ring.release();
  }
  const uint32_t spoiled = spoiled_rows(b.fwd, dk);
  // Through V's rows, which this warp alone has multiplied by.
  const KeyBlock same = tile_again(launch, Block::kTile.block_k);
  store_gradient(dk, shared.v(), block.warp_row,
                 head_at<T>(b.dk, b.dk_stride, same.sequence.batch, same.k_row, same.head),
                 b.dk_stride.seq, same.keys, b.fwd.head_dim, b.fwd.scale, launch.bwd.grads_aligned);
  if (spoiled != 0) {
    repair_dkv<T, Block::kTile.block_k, true, false>(launch.bwd, block.warp_row, spoiled);
  }
}

// Both, behind K and V.
template <class T, int kHeadDim, Scores kScores>
FASTATTN_DEVICE void consume_together(const AttnBwdSm90Launch& launch,
                                      const KeyTile<kHeadDim>& tile,
                                      BwdSharedSm90<kHeadDim> shared) {
  shared.k_ring.wait();
  clear_other_keys(launch, tile, shared);
  if (threadIdx.x < kWarpgroupThreads) {
    consume_for_dv<T, kHeadDim, kScores>(launch, tile, shared);
  } else {
    consume_for_dk<T, kHeadDim, kScores>(launch, tile, shared);
  }
  if (threadIdx.x % kWarpgroupThreads == 0) ptx::bulk_wait_read<0>();
}

}  // namespace fastattn::cuda
