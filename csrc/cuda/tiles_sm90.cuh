// Tile sizes of the sm_90a kernels, each with its reason.
#pragma once

#include "panel_tile.cuh"
#include "tiles.cuh"

namespace fastattn::cuda {

constexpr int kWarpgroupThreads = 128, kWarpgroupRows = 64;
constexpr int kMostSharedSm90 = 227 << 10;  // bytes a block may ask for

// Attention's forward: a warpgroup that copies, and `consumers` that own 64 queries each; block_n
// keys at a time, in kStages buffers of K and of V.
struct FwdTileSm90 {
  int head_dim, consumers, block_n;

  static constexpr int kStages = 2;

  FASTATTN_HD constexpr int block_m() const { return kWarpgroupRows * consumers; }
  FASTATTN_HD constexpr int threads() const { return kWarpgroupThreads * (consumers + 1); }
  // Of 65,536 an SM, so that 128 · (producer + consumers · consumer) fit.
  FASTATTN_HD constexpr int producer_registers() const { return consumers == 2 ? 24 : 32; }
  FASTATTN_HD constexpr int consumer_registers() const { return consumers == 2 ? 240 : 160; }
  FASTATTN_HD constexpr int row_bytes() const {
    return static_cast<int>(round_up(head_dim, 64)) * 2;
  }
  FASTATTN_HD constexpr int barriers() const { return 2 + 4 * kStages; }
  FASTATTN_HD constexpr int shared_bytes() const {
    return row_bytes() * (block_m() + 2 * kStages * block_n) + 8 * barriers();
  }
};

// A consumer's thread holds head_dim / 2 sums, block_n / 2 scores and block_n / 4 packed weights,
// since Q·K(n)ᵀ is computed beside P·V(n + 1): of 240 registers with two consumers, 160 with three.
// Rich scores need some for themselves. The tiles of plain scores are those of FlashAttention-3
// where they fit; all are unmeasured here. What one option alone has a consumer issue for a block,
// against the cycles that its products take, as tests/pipe_cycles.py counts them:
//
//   pass, D       keys  products  plain  ALiBi  bias  mask  dropout
//   forward 64     128       512    459    610   754   815     1504
//   forward 128    112       896    519    615   747   799     1403
//   backward 128   128      1280    734    856  1431  1112     1337
//
// (Plain scores have 128 keys in the forward, and the bias its gradient in the backward.) Philox is
// what dropout takes: 20 products and 20 three-way xors for four keys.
// clang-format off
constexpr FwdTileSm90 kFwdTilesSm90[] = {
    {64, 3, 128},   // 24 + 64 KB; 32 + 64 + 32 registers leave a third consumer room
    {96, 2, 128},   // 32 + 128 KB; 48 + 64 + 32 are too many of 160
    {128, 2, 128},  // 32 + 128 KB; 64 + 64 + 32
    {192, 2, 112},  // 48 + 168 KB; 96 + 56 + 28
    {256, 2, 80},   // 64 + 160 KB, 227 KB being the limit; 128 + 40 + 20
};
constexpr FwdTileSm90 kRichFwdTilesSm90[] = {
    {64, 2, 128},  // dropout's Philox and the addresses of bias and mask don't fit in 160
    {96, 2, 128},
    {128, 2, 112},
    {192, 2, 80},
    {256, 2, 64},
};
// clang-format on

// Attention's backward: block_k keys stay, block_q queries pass by in kStages buffers of Q and of
// their lse and delta, dout_stages of dO. Two consumers have 64 keys each, or the same 64 together:
// then one holds dV, the other dK. Beside these lie dSᵀ, 64 × 64 of dQ in fp32 a consumer, and
// scores in fp32 where one consumer hands them to the other.
struct BwdTileSm90 {
  int head_dim, block_k, block_q, dout_stages;

  static constexpr int kConsumerThreads = 256, kThreads = 384, kStages = 2;

  FASTATTN_HD constexpr bool shares_keys() const { return block_k == kWarpgroupRows; }
  // Of dSᵀ: what is handed over keeps consumers that share keys within one block of queries.
  FASTATTN_HD constexpr int ds_buffers() const { return shares_keys() ? 1 : 2; }
  FASTATTN_HD constexpr int scores_bytes() const {
    return shares_keys() ? 4 * block_k * block_q : 0;
  }
  // A block's dQ, 64 × 64 each.
  FASTATTN_HD constexpr int dq_parts() const { return block_q / 64 * (head_dim / 64); }
  FASTATTN_HD constexpr int barriers() const { return 2 + 4 * kStages + 2 * dout_stages; }
  FASTATTN_HD constexpr int shared_bytes() const {
    return 2 * head_dim * (2 * block_k + (kStages + dout_stages) * block_q) +
           ds_buffers() * 2 * block_k * block_q + 2 * 64 * 64 * 4 + scores_bytes() +
           kStages * 2 * block_q * 4 + 8 * barriers();
  }
};

// A consumer's thread holds head_dim sums, of dK and dV, and block_q scores and their gradients, of
// 240 registers. That is why consumers share keys beyond 128: head_dim / 2 sums are left to each.
// Halves of dK's and dV's columns for each would need no scores handed over, but 2 · 32 queries of
// S and dP instead, products that read 1.5 times as much of shared memory as it delivers.
// clang-format off
FASTATTN_HD constexpr BwdTileSm90 bwd_tile_sm90(int64_t head_dim) {
  if (head_dim <= 64) return {64, 128, 128, 2};  // 193 KB; 64 + 128 registers: as FlashAttention-3
  if (head_dim <= 128) return {128, 128, 64, 2}; // 193 KB; 128 + 64: likewise
  if (head_dim <= 192) return {192, 64, 64, 2};  // 201 KB; 96 + 64, and 32 of a part of dQ
  return {256, 64, 64, 1};  // 217 KB, a second buffer of dO would be 32 more; 128 + 64 + 32
}
// clang-format on

FASTATTN_HD constexpr FwdTileSm90 fwd_tile_sm90(int head_dim, Scores scores) {
  for (int i = 0; i < 5; i++) {
    const FwdTileSm90 tile = scores == Scores::kPlain ? kFwdTilesSm90[i] : kRichFwdTilesSm90[i];
    if (tile.head_dim == head_dim) return tile;
  }
  return {};
}

}  // namespace fastattn::cuda
