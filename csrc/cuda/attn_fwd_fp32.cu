// softmax(scale·QKᵀ …)V in fp32, on any architecture: products by multiply-add, with the same
// ownership of rows, accumulator fragments, softmax and score options as the 16-bit kernels.
//
// K and V take turns in one buffer, which fits 64 KB of shared memory at any size.
#include "../block_range.h"
#include "attn_fwd.h"
#include "elements.cuh"
#include "launch.cuh"
#include "products_fp32.cuh"
#include "query_tile.cuh"
#include "repair.cuh"
#include "score_mods.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {
namespace {

template <int kHeadDim>
struct Fp32Tile {
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kBlockM = 16 * kWarps, kBlockN = kHeadDim <= 128 ? 32 : 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSharedBytes = 4 * FloatTile<kHeadDim>::kStride * (kBlockM + kBlockN);
};

template <int kHeadDim>
__global__ void __launch_bounds__(Fp32Tile<kHeadDim>::kThreads, 1)
    attn_fwd_fp32_kernel(const __grid_constant__ AttnFwdLaunch launch) {
  using Tile = Fp32Tile<kHeadDim>;
  constexpr int kN = Tile::kBlockN / 8, kD = kHeadDim / 8;
  const AttnFwdParams& p = launch.params;
  const QueryTile tile(p, launch.order, Tile::kBlockM, Tile::kBlockN);
  if (tile.rows <= 0) return;
  const Sequence& s = tile.sequence;
  const KernelWindow window(tile.window);
  const ScoreMods<float> mods(p, s, tile.window, tile.head);
  const int head_dim = static_cast<int>(p.head_dim), head_dim_v = static_cast<int>(p.head_dim_v);
  const float* q = head_at<const float>(p.q, p.q_stride, s.batch, tile.q_row, tile.head);
  const float* k = head_at<const float>(p.k, p.k_stride, s.batch, s.k_row, tile.head_k);
  const float* v = head_at<const float>(p.v, p.v_stride, s.batch, s.k_row, tile.head_k);

  FASTATTN_SHARED(shared);
  const FloatTile<kHeadDim> sQ{reinterpret_cast<float*>(shared)}, sKV{sQ.row(Tile::kBlockM)};
  const int warp_row = threadIdx.x / 32 * 16, first_query = tile.first + warp_row;
  copy_rows<Tile::kBlockM, kHeadDim, Tile::kThreads>(sQ, q, p.q_stride.seq, 0, tile.rows, head_dim);
  float out[1][kD][4];
  clear(out);
  OnlineSoftmax<1, Exponent::kExact> softmax(kLog2E);

  for (int n_block = tile.n_block_end - 1; n_block >= tile.n_block_min; n_block--) {
    const int first_key = n_block * Tile::kBlockN;
    copy_rows<Tile::kBlockN, kHeadDim, Tile::kThreads>(sKV, k, p.k_stride.seq, first_key,
                                                       window.seqlen_k, head_dim);
    __syncthreads();
    float scores[1][kN][4];
    multiply_rows(scores, sQ, warp_row, sKV);
    __syncthreads();
    copy_rows<Tile::kBlockN, kHeadDim, Tile::kThreads>(sKV, v, p.v_stride.seq, first_key,
                                                       window.seqlen_k, head_dim_v);
    const Position at = thread_position(first_query, first_key);
    mods.apply(scores, at);
    if (!window.shows({first_query, first_query + 16}, {first_key, first_key + Tile::kBlockN})) {
      hide_outside(scores, window, at);
    }
    softmax.update(scores, out);
    if (p.seed) mods.drop(scores, at);
    __syncthreads();
    multiply_add(out, scores, sKV);
    __syncthreads();
  }

  finish_rows(p, tile, warp_row, softmax, out);
  const uint32_t spoiled = spoiled_rows(p, out);
  float* rows = head_at<float>(p.out, p.out_stride, tile.batch, tile.q_row, tile.head);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = warp_row + lane / 4 + 8 * half;
    if (r >= tile.rows) continue;
#pragma unroll
    for (int d = 0; d < kD; d++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int c = 8 * d + lane % 4 * 2 + e;
        if (c < head_dim_v) rows[r * p.out_stride.seq + c] = out[0][d][2 * half + e];
      }
    }
  }
  if (spoiled != 0) repair_rows<float, Tile::kBlockM>(launch, warp_row, spoiled);
}

template <int kHeadDim>
void launch_fp32(const AttnFwdParams& p, const Device& device) {
  using Tile = Fp32Tile<kHeadDim>;
  AttnFwdLaunch params{};
  params.params = p;
  params.order = make_work_order(p, Tile::kBlockM, sizeof(float));
  const Grid grid{params.order.items(), 1, 1, Tile::kThreads, Tile::kSharedBytes};
  launch(attn_fwd_fp32_kernel<kHeadDim>, grid, params, device, describe(p));
}

}  // namespace

void attn_fwd_fp32(const AttnFwdParams& p, const Device& device) {
  const int64_t head_dim = greater(p.head_dim, p.head_dim_v);
  if (head_dim <= 64) return launch_fp32<64>(p, device);
  if (head_dim <= 128) return launch_fp32<128>(p, device);
  launch_fp32<256>(p, device);
}

}  // namespace fastattn::cuda
