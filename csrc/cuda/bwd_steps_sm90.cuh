// Steps of a consumer in Hopper's backward: from scores to gradients, and dQ on its way to the
// sums.
#pragma once

#include "bwd_keys_sm90.cuh"
#include "score_mods.cuh"

namespace fastattn::cuda {

// Named barriers: of both consumers, and one each.
constexpr int kBothConsumers = 1, kOneConsumer = 2;

// Rows [count, …) become zeros: of a packed tensor they are the next sequence's, and its NaN must
// not meet our zeros. By one consumer or both, who meet behind it.
template <int kThreads, class Tile>
FASTATTN_DEVICE void clear_rows(const Tile& tile, int count) {
  constexpr int kChunks = Tile::kPanels * Tile::kGroup;
#pragma unroll 1
  for (int i = max(count, 0) * kChunks + threadIdx.x % kThreads; i < Tile::kRows * kChunks;
       i += kThreads) {
    *reinterpret_cast<uint4*>(tile.chunk(i / kChunks, i % kChunks)) = make_uint4(0, 0, 0, 0);
  }
}
// What threads wrote to shared memory is there for everyone's products.
FASTATTN_DEVICE void meet_consumers() {
  ptx::fence_proxy_async();
  ptx::bar_sync(kBothConsumers, BwdTileSm90::kConsumerThreads);
}
FASTATTN_DEVICE void meet_warpgroup(int consumer) {
  ptx::fence_proxy_async();
  ptx::bar_sync(kOneConsumer + consumer, kWarpgroupThreads);
}

// Of K, when it is there. Those of V spoil nothing but gradients that nobody wants.
template <int kHeadDim>
FASTATTN_DEVICE void clear_other_keys(const AttnBwdSm90Launch& launch,
                                      const KeyTile<kHeadDim>& tile,
                                      const BwdSharedSm90<kHeadDim>& shared) {
  if (launch.bwd.params.fwd.cu_seqlens_q && tile.keys < KeyTile<kHeadDim>::kTile.block_k) {
    clear_rows<BwdTileSm90::kConsumerThreads>(shared.k(), tile.keys);
    meet_consumers();
  }
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

// dSᵀ to shared memory, rows of keys.
template <class DSTile, int kK>
FASTATTN_DEVICE void store_ds(const uint32_t (&ds)[kK][4], const DSTile& sDS, int warp_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 2 * kK; n++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned char* chunk = sDS.chunk(warp_row + lane / 4 + 8 * half, n);
      reinterpret_cast<uint32_t*>(chunk)[lane % 4] = ds[n / 2][n % 2 * 2 + half];
    }
  }
}

// 64 × 64 of a block's dQ: which 64 queries, and which 64 columns.
struct DQPart {
  int rows, columns;
};
FASTATTN_DEVICE DQPart dq_part(int block_q, int index) {
  return {index % (block_q / 64), index / (block_q / 64)};
}

// To shared memory, when what was there has left it.
template <class DQTile>
FASTATTN_DEVICE void stage_dq(const float (&dq)[1][8][4], const DQTile& sDQ, int consumer) {
  const int thread = threadIdx.x % kWarpgroupThreads, lane = thread % 32;
  if (thread == 0) ptx::bulk_wait_read<0>();
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
  meet_warpgroup(consumer);
}

// And from there to the sums, by one thread: in its turn, if there are turns.
template <int kHeadDim>
FASTATTN_DEVICE void add_dq(const AttnBwdSm90Launch& launch, const KeyTile<kHeadDim>& tile,
                            int head, int m_block, int index, const unsigned char* staged) {
  constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);
  constexpr int kBlockQ = kTile.block_q, kPanelBytes = 64 * 128;
  const AttnFwdParams& p = launch.bwd.params.fwd;
  const DQPart part = dq_part(kBlockQ, index);
  uint32_t* turns = launch.turns;
  if (turns) {
    const int m_blocks = static_cast<int>(ceil_div(p.seqlen_q, kBlockQ));
    turns +=
        ((int64_t{tile.batch} * p.heads_q + head) * m_blocks + m_block) * kTile.dq_parts() + index;
    const uint32_t mine = tile.turn(m_block);
    while (*static_cast<volatile uint32_t*>(turns) != mine) __nanosleep(64);
    __threadfence();
  }
  const int row = static_cast<int>(tile.sequence.q_row) + m_block * kBlockQ + 64 * part.rows;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    ptx::tma_reduce_add(&launch.dq, staged + i * kPanelBytes, 64 * part.columns + 32 * i, row, head,
                        p.cu_seqlens_q ? 0 : tile.batch);
  }
  ptx::bulk_commit();
  if (turns) {
    ptx::bulk_wait<0>();  // in global memory, not only out of shared memory
    __threadfence();
    atomicAdd(turns, 1u);
  }
}

}  // namespace fastattn::cuda
