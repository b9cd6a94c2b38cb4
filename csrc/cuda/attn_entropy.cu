// How spread out each query's weights are, −Σ w · log w, from what attn_fwd has left: with
// w = exp(score − lse) that is Σ w · (lse − score). On any architecture and dtype: products by
// multiply-add in fp32, of rows widened on their way to shared memory; it is for looking, not for
// training.
#include "../block_range.h"
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "products_fp32.cuh"
#include "query_tile.cuh"
#include "score_mods.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {
namespace {

struct AttnEntropyLaunch {
  AttnEntropyParams params;
  WorkOrder order;
};

// A warp has 16 queries, a block 64, and 32 keys pass by at a time; 64 KB hold 256 of head dim.
template <int kHeadDim>
struct EntropyTile {
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kBlockM = 16 * kWarps, kBlockN = kHeadDim <= 128 ? 32 : 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSharedBytes = 4 * FloatTile<kHeadDim>::kStride * (kBlockM + kBlockN);
};

// One block an SM is asked: left to itself ptxas takes 40 to 94 registers, and spills some.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(EntropyTile<kHeadDim>::kThreads, 1)
    attn_entropy_kernel(const __grid_constant__ AttnEntropyLaunch launch) {
  using Tile = EntropyTile<kHeadDim>;
  constexpr int kN = Tile::kBlockN / 8;
  const AttnFwdParams& p = launch.params.fwd;
  const QueryTile tile(p, launch.order, Tile::kBlockM, Tile::kBlockN);
  if (tile.rows <= 0) return;
  const Sequence& s = tile.sequence;
  const KernelWindow window(tile.window);
  const ScoreMods<T> mods(p, s, tile.window, tile.head);
  const int head_dim = static_cast<int>(p.head_dim), lane = threadIdx.x % 32;
  const T* q = head_at<const T>(p.q, p.q_stride, s.batch, tile.q_row, tile.head);
  const T* k = head_at<const T>(p.k, p.k_stride, s.batch, s.k_row, tile.head_k);

  FASTATTN_SHARED(shared);
  const FloatTile<kHeadDim> sQ{reinterpret_cast<float*>(shared)}, sK{sQ.row(Tile::kBlockM)};
  const int warp_row = threadIdx.x / 32 * 16, first_query = tile.first + warp_row;
  copy_rows<Tile::kBlockM, kHeadDim, Tile::kThreads>(sQ, q, p.q_stride.seq, 0, tile.rows, head_dim);

  const int64_t first_row =
      s.batch * p.lse_stride_batch + tile.head * p.lse_stride_head + tile.q_row;
  const int row = warp_row + lane / 4;  // and row + 8
  float lse[2], entropy[2] = {};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    lse[half] = row + 8 * half < tile.rows ? p.lse[first_row + row + 8 * half] : -INFINITY;
    if (lse[half] == -INFINITY) lse[half] = INFINITY;  // no key is seen: weights of 0
  }
  for (int n_block = tile.n_block_min; n_block < tile.n_block_end; n_block++) {
    const int first_key = n_block * Tile::kBlockN;
    copy_rows<Tile::kBlockN, kHeadDim, Tile::kThreads>(sK, k, p.k_stride.seq, first_key,
                                                       window.seqlen_k, head_dim);
    __syncthreads();
    float scores[1][kN][4];
    multiply_rows(scores, sQ, warp_row, sK);
    __syncthreads();
    const Position at = thread_position(first_query, first_key);
    mods.apply(scores, at);
    if (!window.shows({first_query, first_query + 16}, {first_key, first_key + Tile::kBlockN})) {
      hide_outside(scores, window, at);
    }
    for_each_element(scores, [&](float& score, int, int, int half, int) {
      const float gap = lse[half] - score, weight = ptx::ex2(-gap * kLog2E);
      if (weight != 0.0f) entropy[half] += weight * gap;  // 0 · ∞ = 0
    });
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float sum = quad_sum(entropy[half]);
    if (lane % 4 == 0 && row + 8 * half < tile.rows) {
      launch.params.entropy[first_row + row + 8 * half] = sum;
    }
  }
}

template <class T, int kHeadDim>
void launch_entropy(const AttnEntropyParams& params, const Device& device) {
  using Tile = EntropyTile<kHeadDim>;
  const WorkOrder order = make_work_order(params.fwd, Tile::kBlockM, sizeof(T));
  const Grid grid{order.items(), 1, 1, Tile::kThreads, Tile::kSharedBytes};
  launch(attn_entropy_kernel<T, kHeadDim>, grid, AttnEntropyLaunch{params, order}, device,
         "attn_entropy of " + describe(params.fwd));
}

template <class T>
void launch_entropy(const AttnEntropyParams& params, const Device& device) {
  if (params.fwd.head_dim <= 64) return launch_entropy<T, 64>(params, device);
  if (params.fwd.head_dim <= 128) return launch_entropy<T, 128>(params, device);
  launch_entropy<T, 256>(params, device);
}

}  // namespace

void attn_entropy(const AttnEntropyParams& params, const Device& device) {
  if (params.fwd.dtype == DType::kF32) return launch_entropy<float>(params, device);
  if (params.fwd.dtype == DType::kBF16) return launch_entropy<bf16>(params, device);
  launch_entropy<fp16>(params, device);
}

}  // namespace fastattn::cuda
