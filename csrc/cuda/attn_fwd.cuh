// softmax(scale·QKᵀ …)V with mma.sync, for sm_75 and sm_80 … sm_120.
//
// A block of threads owns kBlockM queries of one head, a warp 16 or 32 of them: all their scores
// and the whole of their output stay in its registers, so that the softmax needs no exchange beyond
// a quad of lanes, and weights go from accumulators to operands where they are. With 32 rows every
// fragment of K and V feeds two products, which halves what shared memory has to deliver.
//
// Keys pass by in blocks of kBlockN, from the last to the first (FlashAttention-2's schedule; Dao,
// 2023). K and V have one buffer each: V(n) is copied while Q·K(n)ᵀ is computed, K(n − 1) during
// the softmax and P·V(n); two barriers a block. Causal masks and windows are ranges of blocks at
// run time; a warp masks only blocks its window's edge passes through.
//
//   S = Q·Kᵀ                  (kBlockM, kBlockN)  fp32 accumulators
//   P = 2^(S·factor − row_max)                    rounded to T
//   O = O·rescale + P·V       (kBlockM, kHeadDim) fp32 accumulators
#pragma once

#include "elements.cuh"
#include "fragments.cuh"
#include "launch.cuh"
#include "products.cuh"
#include "query_tile.cuh"
#include "repair.cuh"
#include "score_mods.cuh"
#include "softmax.cuh"
#include "store_rows.cuh"
#include "tile_copy.cuh"
#include "tiles.cuh"

namespace fastattn::cuda {

// One block an SM is asked of ptxas 13.0 where it would spill without (rich, on sm_120), and not
// where it would spill with (plain, on sm_100).
template <class Arch, class T, int kHeadDim, Scores kScores>
static __global__ void __launch_bounds__(fwd_tile<Arch>(kHeadDim, kScores).threads(),
                                         kScores == Scores::kRich)
    attn_fwd_kernel(const __grid_constant__ AttnFwdLaunch launch) {
  constexpr FwdTile kTile = fwd_tile<Arch>(kHeadDim, kScores);
  constexpr int kBlockM = kTile.block_m, kBlockN = kTile.block_n;
  constexpr int kThreads = kTile.threads(), kM = kTile.m_tiles();
  constexpr int kN = kBlockN / 8, kD = kHeadDim / 8;  // accumulators along keys and head dim
  constexpr int kWarpRows = 16 * kM;

  const AttnFwdParams& p = launch.params;
  const QueryTile tile(p, launch.order, kBlockM, kBlockN);
  if (tile.rows <= 0) return;
  const Sequence& s = tile.sequence;
  const KernelWindow window(tile.window);

  FASTATTN_SHARED(shared);
  const SharedTile<kHeadDim> sQ{shared}, sK{shared + 2 * kHeadDim * kBlockM},
      sV{shared + 2 * kHeadDim * (kBlockM + kBlockN)};
  const TileSource<T> gQ{head_at<const T>(p.q, p.q_stride, s.batch, tile.q_row, tile.head),
                         p.q_stride.seq, static_cast<int>(p.head_dim), launch.qkv_aligned};
  const TileSource<T> gK{head_at<const T>(p.k, p.k_stride, s.batch, s.k_row, tile.head_k),
                         p.k_stride.seq, static_cast<int>(p.head_dim), launch.qkv_aligned};
  const TileSource<T> gV{head_at<const T>(p.v, p.v_stride, s.batch, s.k_row, tile.head_k),
                         p.v_stride.seq, static_cast<int>(p.head_dim_v), launch.qkv_aligned};
  TileCopy<Arch, T, kBlockN, kHeadDim, kThreads> k_copy(gK, sK), v_copy(gV, sV);

  const int warp_row = threadIdx.x / 32 * kWarpRows;  // in the tile
  const int first_query = tile.first + warp_row;      // of the warp
  const ScoreMods<T> mods(p, s, tile.window, tile.head);

  constexpr int kQ = kTile.q_in_registers ? kHeadDim / 16 : 1;
  uint32_t q[kQ][kM][4];
  if (tile.n_block_min < tile.n_block_end) {
    copy_tile<Arch, T, kBlockM, kHeadDim, kThreads>(gQ, sQ, 0, tile.rows);
    k_copy.start((tile.n_block_end - 1) * kBlockN, window.seqlen_k);
    k_copy.finish();  // and Q
    __syncthreads();
    if constexpr (kTile.q_in_registers) {
#pragma unroll
      for (int k = 0; k < kQ; k++) {
#pragma unroll
        for (int m = 0; m < kM; m++) load_a(q[k][m], sQ, warp_row + 16 * m, k);
      }
    }
  }

  float out[kM][kD][4];
  clear(out);
  OnlineSoftmax<kM> softmax(kScores == Scores::kPlain ? p.scale * kLog2E : kLog2E);

  for (int n_block = tile.n_block_end - 1; n_block >= tile.n_block_min; n_block--) {
    const int first_key = n_block * kBlockN;
    v_copy.start(first_key, window.seqlen_k);
    float scores[kM][kN][4];
    multiply_rows<Arch, T>(scores, sQ, warp_row, q, sK);
    v_copy.finish();
    __syncthreads();  // V is there, and nobody reads K any more
    if (n_block > tile.n_block_min) k_copy.start(first_key - kBlockN, window.seqlen_k);

    const Position at = thread_position(first_query, first_key);
    if constexpr (kScores == Scores::kRich) mods.apply(scores, at);
    if (!window.shows({first_query, first_query + kWarpRows}, {first_key, first_key + kBlockN})) {
      hide_outside(scores, window, at);
    }
    softmax.update(scores, out);
    if constexpr (kScores == Scores::kRich) {
      if (p.seed) mods.drop(scores, at);
    }
    multiply_add<Arch, T>(out, scores, sV);
    if (n_block > tile.n_block_min) {
      k_copy.finish();
      __syncthreads();  // K is there, and nobody reads V any more
    }
  }

#if __CUDA_ARCH__ == 900  // where ptxas 13.0 would spill 24 bytes with the other line
  const QueryTile& same = tile;
#else  // found again, so that the loop keeps nothing of it in registers: on sm_120 it would spill
  const QueryTile same(p, launch.order, kBlockM, kBlockN, ptx::anew(blockIdx.x));
#endif
  finish_rows(p, same, warp_row, softmax, out);
  const uint32_t spoiled = spoiled_rows(p, out);
  T* out_rows = head_at<T>(p.out, p.out_stride, same.batch, same.q_row, same.head);
  store_out(out, sQ, warp_row, out_rows, p.out_stride.seq, same.rows,
            static_cast<int>(p.head_dim_v), launch.out_aligned);
  if (spoiled != 0) repair_rows<T, kBlockM>(launch, warp_row, spoiled);
}

template <class Arch, class T, int kHeadDim, Scores kScores>
void launch_attn_fwd(AttnFwdLaunch params, const Device& device) {
  constexpr FwdTile kTile = fwd_tile<Arch>(kHeadDim, kScores);
  static_assert(kTile.shared_bytes() <= Arch::kMostShared);
  params.order = make_work_order(params.params, kTile.block_m, sizeof(T));
  const Grid grid{params.order.items(), 1, 1, kTile.threads(), kTile.shared_bytes()};
  launch(attn_fwd_kernel<Arch, T, kHeadDim, kScores>, grid, params, device,
         describe(params.params));
}

template <class Arch, class T, int kHeadDim>
void launch_attn_fwd(const AttnFwdParams& p, const Device& device) {
  AttnFwdLaunch params{};
  params.params = p;
  params.qkv_aligned = rows_aligned<T>(p.q, p.q_stride, p.head_dim) &&
                       rows_aligned<T>(p.k, p.k_stride, p.head_dim) &&
                       rows_aligned<T>(p.v, p.v_stride, p.head_dim_v);
  params.out_aligned = rows_aligned<T>(p.out, p.out_stride, p.head_dim_v);
  if (is_rich(p)) {
    launch_attn_fwd<Arch, T, kHeadDim, Scores::kRich>(params, device);
  } else {
    launch_attn_fwd<Arch, T, kHeadDim, Scores::kPlain>(params, device);
  }
}

// Head dims are built at these sizes; what is missing is filled with zeros.
template <class Arch, class T>
void launch_attn_fwd(const AttnFwdParams& p, const Device& device) {
  const int64_t head_dim = greater(p.head_dim, p.head_dim_v);
  if (head_dim <= 64) return launch_attn_fwd<Arch, T, 64>(p, device);
  if (head_dim <= 96) return launch_attn_fwd<Arch, T, 96>(p, device);
  if (head_dim <= 128) return launch_attn_fwd<Arch, T, 128>(p, device);
  if (head_dim <= 192) return launch_attn_fwd<Arch, T, 192>(p, device);
  return launch_attn_fwd<Arch, T, 256>(p, device);
}

}  // namespace fastattn::cuda
