// Gradients of softmax(scale·QKᵀ …)V, recomputed from q, k, v, out and lse (Dao et al.,
// "FlashAttention", 2022, appendix B.4), without atomics on dq, dk and dv: the same bit for bit
// each time.
//
//   delta = rowsum(dO ∘ O) − dlse      P = exp(S − lse)      dP = dO·Vᵀ
//   dS = P ∘ (dP − delta)              dV = Pᵀ·dO    dK = scale · dSᵀ·Q    dQ = scale · dS·K
//
// Three passes. The first writes delta and lse to the workspace. For dQ a block of threads keeps
// kBlockM queries and goes over the keys they see; for dK and dV it keeps kBlockM keys and goes
// over the queries that see them, of all query heads of the group. Both run the forward's products:
// with keys in the rows of fragments, Sᵀ = K·Qᵀ comes out as the operand that Pᵀ·dO takes. S is
// computed twice; in return nothing is added by two blocks. A sink's gradient is −Σ exp(sink −
// lse)·delta.
#pragma once

#include "../block_range.h"
#include "bwd_gradients.cuh"
#include "bwd_math.cuh"
#include "bwd_repair.cuh"
#include "elements.cuh"
#include "key_block.cuh"
#include "launch.cuh"
#include "query_tile.cuh"
#include "repair.cuh"
#include "work_order.cuh"

namespace fastattn::cuda {

// One row of (B, H_q, S_q) for every warp. Blocks are counted by one number: a grid's second and
// third end at 65535, and batches of windows may be longer.
struct WarpRow {
  static constexpr int kWarps = 4;  // a block
  int query, head, batch;

  static Grid grid(const AttnFwdParams& p) {
    return {ceil_div(p.seqlen_q, kWarps) * p.heads_q * p.batch, 1, 1, 32 * kWarps};
  }
  FASTATTN_DEVICE explicit WarpRow(const AttnFwdParams& p, unsigned block = blockIdx.x) {
    const unsigned heads = p.heads_q, blocks = ceil_div(p.seqlen_q, kWarps);  // of a head
    query = block % blocks * kWarps + threadIdx.x / 32;
    head = block / blocks % heads;
    batch = block / blocks / heads;
  }
};

// delta and lse, a warp to a row.
template <class T>
static __global__ void __launch_bounds__(128)
    attn_bwd_prep_kernel(const __grid_constant__ AttnBwdLaunch launch) {
  const AttnBwdParams& b = launch.params;
  const AttnFwdParams& p = b.fwd;
  const auto [query, head, batch] = WarpRow(p);
  const int lane = threadIdx.x % 32;
  const Sequence s = sequence_at(p, batch);
  if (query >= s.seqlen_q) return;
  const int64_t row = s.q_row + query;
  const T* out = head_at<const T>(p.out, p.out_stride, s.batch, row, head);
  const T* dout = head_at<const T>(b.dout, b.dout_stride, s.batch, row, head);
  float delta = 0.0f;
  for (int d = lane; d < p.head_dim_v; d += 32) delta += to_float(out[d]) * to_float(dout[d]);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
  if (lane != 0) return;
  if (b.dlse) delta -= b.dlse[s.batch * b.dlse_stride_batch + head * b.dlse_stride_head + row];
  const float lse = p.lse[s.batch * p.lse_stride_batch + head * p.lse_stride_head + row];
  const int64_t at = (batch * p.heads_q + head) * p.seqlen_q + query;
  launch.delta[at] = delta;
  launch.lse[at] = lse == -INFINITY ? INFINITY : lse;
}

// One warp a head, in a fixed order.
static __global__ void __launch_bounds__(32)
    attn_bwd_dsinks_kernel(const __grid_constant__ AttnBwdLaunch launch) {
  const AttnFwdParams& p = launch.params.fwd;
  const int head = blockIdx.x, lane = threadIdx.x;
  const float sink = p.sinks[head];
  float sum = 0.0f;
  for (int batch = 0; batch < p.batch; batch++) {
    const int64_t first = (batch * p.heads_q + head) * p.seqlen_q;
    const Sequence s = sequence_at(p, batch);
    for (int64_t i = lane; i < s.seqlen_q; i += 32) {
      sum -= expf(sink - launch.lse[first + i]) * launch.delta[first + i];
    }
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (lane == 0) launch.params.dsinks[head] = sum;
}

// Blocks of keys and values on their way through shared memory.
template <class Math, int kHeadDim>
struct KeyStages {
  using Size = BwdTile<Math, kHeadDim>;
  using Tile = typename Math::template Tile<kHeadDim>;
  unsigned char* bytes;
  TileSource<typename Math::T> gK, gV;
  int seqlen_k;

  FASTATTN_DEVICE Tile k(int stage) const {
    return Math::template tile<kHeadDim>(bytes + 2 * stage * Size::kBlockN * Size::kRowBytes);
  }
  FASTATTN_DEVICE Tile v(int stage) const {
    return Math::template tile<kHeadDim>(bytes + (2 * stage + 1) * Size::kBlockN * Size::kRowBytes);
  }
  FASTATTN_DEVICE void copy(int n_block, int stage) const {
    const int first = n_block * Size::kBlockN;
    Math::template copy<Size::kBlockN, Size::kThreads>(k(stage), gK, first, seqlen_k);
    Math::template copy<Size::kBlockN, Size::kThreads>(v(stage), gV, first, seqlen_k);
  }
};

template <class Math, int kHeadDim, Scores kScores>
static __global__ void __launch_bounds__(BwdTile<Math, kHeadDim>::kThreads, 1)
    attn_bwd_dq_kernel(const __grid_constant__ AttnBwdLaunch launch) {
  using T = typename Math::T;
  using Size = BwdTile<Math, kHeadDim>;
  constexpr int kBlockM = Size::kBlockM, kBlockN = Size::kBlockN, kThreads = Size::kThreads;
  constexpr int kN = kBlockN / 8, kD = kHeadDim / 8;
  const AttnBwdParams& b = launch.params;
  const AttnFwdParams& p = b.fwd;
  const QueryTile tile(p, launch.order, kBlockM, kBlockN);
  if (tile.rows <= 0) return;
  const Sequence& s = tile.sequence;
  const KernelWindow window(tile.window);
  const int head_dim = p.head_dim, head_dim_v = p.head_dim_v;

  FASTATTN_SHARED(shared);
  const auto sQ = Math::template tile<kHeadDim>(shared);
  const auto sDO = Math::template tile<kHeadDim>(shared + kBlockM * Size::kRowBytes);
  const TileSource<T> gQ{head_at<const T>(p.q, p.q_stride, s.batch, tile.q_row, tile.head),
                         p.q_stride.seq, head_dim, launch.aligned};
  const TileSource<T> gDO{head_at<const T>(b.dout, b.dout_stride, s.batch, tile.q_row, tile.head),
                          b.dout_stride.seq, head_dim_v, launch.aligned};
  const KeyStages<Math, kHeadDim> keys{
      shared + 2 * kBlockM * Size::kRowBytes,
      {head_at<const T>(p.k, p.k_stride, s.batch, s.k_row, tile.head_k), p.k_stride.seq, head_dim,
       launch.aligned},
      {head_at<const T>(p.v, p.v_stride, s.batch, s.k_row, tile.head_k), p.v_stride.seq, head_dim_v,
       launch.aligned},
      window.seqlen_k};
  constexpr bool kAhead = Size::kKeyStages == 2;

  const int warp_row = threadIdx.x / 32 * 16, first_query = tile.first + warp_row;
  const int64_t head_row = (int64_t{tile.batch} * p.heads_q + tile.head) * p.seqlen_q;
  const int row = first_query + threadIdx.x % 32 / 4, seqlen_q = static_cast<int>(s.seqlen_q);
  const float2 stats[2] = {
      stats_at(launch.lse + head_row, launch.delta + head_row, row, seqlen_q),
      stats_at(launch.lse + head_row, launch.delta + head_row, row + 8, seqlen_q)};
  const Gradients<T, Rows::kQueries, true, kScores> gradients(b, s, tile.window, tile.head);
  float dq[1][kD][4];
  clear(dq);
  typename Math::template Operand<kHeadDim, kAhead> own_q{sQ, warp_row}, own_dout{sDO, warp_row};
  if (tile.n_block_min < tile.n_block_end) {
    Math::template copy<kBlockM, kThreads>(sQ, gQ, 0, tile.rows);
    Math::template copy<kBlockM, kThreads>(sDO, gDO, 0, tile.rows);
    if constexpr (kAhead) {
      keys.copy(tile.n_block_min, 0);
      Math::finish_copies();
      __syncthreads();
      own_q.hold();
      own_dout.hold();
    }
  }

  int stage = 0;
  for (int n_block = tile.n_block_min; n_block < tile.n_block_end; n_block++) {
    const int first_key = n_block * kBlockN;
    if constexpr (!kAhead) {
      __syncthreads();  // nobody reads the K and V before
      keys.copy(n_block, 0);
    }
    Math::finish_copies();
    __syncthreads();
    if (kAhead && n_block + 1 < tile.n_block_end) keys.copy(n_block + 1, stage ^ 1);
    float weights[1][kN][4], dweights[1][kN][4];
    Math::rows(weights, own_q, keys.k(stage));
    Math::rows(dweights, own_dout, keys.v(stage));
    const bool inside =
        window.shows({first_query, first_query + 16}, {first_key, first_key + kBlockN});
    gradients.apply(weights, dweights, window, inside, thread_position(first_query, first_key),
                    [&](int, int half, int) { return stats[half]; });
    Math::add(dq, dweights, keys.k(stage));
    if (kAhead) stage ^= 1;
  }
  const uint32_t spoiled = spoiled_rows(p, dq);
  // Found again, so that the loop keeps nothing of it in registers.
  const QueryTile same(p, launch.order, kBlockM, kBlockN, ptx::anew(blockIdx.x));
  T* to = head_at<T>(b.dq, b.dq_stride, same.sequence.batch, same.q_row, same.head);
  Math::store(dq, own_q, to, b.dq_stride.seq, same.rows, p.head_dim, p.scale, launch.grads_aligned);
  for (uint32_t left = spoiled; left != 0; left &= left - 1) {
    const int r = warp_row + __ffs(static_cast<int>(left)) - 1;
    if (r < same.rows) repair_dq<T>(launch, same.batch, same.head, same.first + r);
  }
}

// Which of dK and dV a launch computes: where registers hold only one of them, there are two.
enum class Part { kBoth, kDK, kDV };

template <class Math, int kHeadDim, Scores kScores, Part kPart>
static __global__ void __launch_bounds__(BwdTile<Math, kHeadDim>::kThreads, 1)
    attn_bwd_dkv_kernel(const __grid_constant__ AttnBwdLaunch launch) {
  using T = typename Math::T;
  using Size = BwdTile<Math, kHeadDim>;
  constexpr int kBlockM = Size::kBlockM, kBlockQ = Size::kBlockQ, kThreads = Size::kThreads;
  constexpr int kN = kBlockQ / 8, kD = kHeadDim / 8;
  const AttnBwdParams& b = launch.params;
  const AttnFwdParams& p = b.fwd;
  const KeyBlock block(p, launch.order, kBlockM);
  if (block.keys <= 0) return;
  const Sequence& s = block.sequence;
  const KernelWindow seen_by = block.seen_by();
  const int head_dim = p.head_dim, head_dim_v = p.head_dim_v;
  const int seqlen_q = static_cast<int>(s.seqlen_q);

  FASTATTN_SHARED(shared);
  const auto sK = Math::template tile<kHeadDim>(shared);
  const auto sV = Math::template tile<kHeadDim>(shared + kBlockM * Size::kRowBytes);
  const auto sQ = Math::template tile<kHeadDim>(shared + 2 * kBlockM * Size::kRowBytes);
  const auto sDO =
      Math::template tile<kHeadDim>(shared + (2 * kBlockM + kBlockQ) * Size::kRowBytes);
  float* sStats =  // lse of the queries, then delta
      reinterpret_cast<float*>(shared + 2 * (kBlockM + kBlockQ) * Size::kRowBytes);
  const TileSource<T> gK{head_at<const T>(p.k, p.k_stride, s.batch, block.k_row, block.head),
                         p.k_stride.seq, head_dim, launch.aligned};
  const TileSource<T> gV{head_at<const T>(p.v, p.v_stride, s.batch, block.k_row, block.head),
                         p.v_stride.seq, head_dim_v, launch.aligned};
  const int warp_row = threadIdx.x / 32 * 16, warp_key = block.first + warp_row;
  float dk[1][kPart == Part::kDV ? 1 : kD][4], dv[1][kPart == Part::kDK ? 1 : kD][4];
  clear(dk);
  clear(dv);
  constexpr bool kHeld = Math::kHolds && kHeadDim <= 64;
  typename Math::template Operand<kHeadDim, kHeld> own_k{sK, warp_row}, own_v{sV, warp_row};
  const int query_begin = block.query_begin / kBlockQ * kBlockQ;
  int heads_left = query_begin < block.query_end ? launch.order.group_size : 0;
  if (heads_left > 0) {
    Math::template copy<kBlockM, kThreads>(sK, gK, 0, block.keys);
    Math::template copy<kBlockM, kThreads>(sV, gV, 0, block.keys);
    if constexpr (kHeld) {
      Math::finish_copies();
      __syncthreads();
      own_k.hold();
      own_v.hold();
    }
  }
  // One loop over the blocks of queries of all heads: two would keep more in registers.
  int head = block.head * launch.order.group_size, query = query_begin;
#pragma unroll 1
  while (heads_left > 0) {
    const TileSource<T> gQ{head_at<const T>(p.q, p.q_stride, s.batch, s.q_row, head),
                           p.q_stride.seq, head_dim, launch.aligned};
    const TileSource<T> gDO{head_at<const T>(b.dout, b.dout_stride, s.batch, s.q_row, head),
                            b.dout_stride.seq, head_dim_v, launch.aligned};
    __syncthreads();  // nobody reads the Q and dO before
    Math::template copy<kBlockQ, kThreads>(sQ, gQ, query, seqlen_q);
    Math::template copy<kBlockQ, kThreads>(sDO, gDO, query, seqlen_q);
    if (threadIdx.x < kBlockQ) {
      const int64_t head_row = (int64_t{block.batch} * p.heads_q + head) * p.seqlen_q;
      const float2 stats = stats_at(launch.lse + head_row, launch.delta + head_row,
                                    query + static_cast<int>(threadIdx.x), seqlen_q);
      sStats[threadIdx.x] = stats.x;
      sStats[kBlockQ + threadIdx.x] = stats.y;
    }
    Math::finish_copies();
    __syncthreads();
    float weights[1][kN][4], dweights[1][kN][4];
    Math::rows(weights, own_k, sQ);
    Math::rows(dweights, own_v, sDO);
    const bool inside = seen_by.shows({warp_key, warp_key + 16}, {query, query + kBlockQ});
    const Position at = thread_position(warp_key, query);
    const Gradients<T, Rows::kKeys, false, kScores> gradients(b, s, block.window, head);
    gradients.apply(weights, dweights, seen_by, inside, at, [&](int n, int, int e) {
      const int i = at.column - query + 8 * n + e;
      return make_float2(sStats[i], sStats[kBlockQ + i]);
    });
    if constexpr (kPart != Part::kDK) Math::add(dv, weights, sDO);
    if constexpr (kPart != Part::kDV) Math::add(dk, dweights, sQ);
    query += kBlockQ;
    if (query >= block.query_end) {
      query = query_begin;
      head++;
      heads_left--;
    }
  }
  const uint32_t spoiled = spoiled_rows(p, dk) | spoiled_rows(p, dv);
  // Found again, so that the loop keeps nothing of it in registers: on sm_75 it would spill.
  const KeyBlock same(p, launch.order, kBlockM, ptx::anew(blockIdx.x));
  if constexpr (kPart != Part::kDV) {
    T* to = head_at<T>(b.dk, b.dk_stride, same.sequence.batch, same.k_row, same.head);
    Math::store(dk, own_k, to, b.dk_stride.seq, same.keys, p.head_dim, p.scale,
                launch.grads_aligned);
  }
  if constexpr (kPart != Part::kDK) {
    T* to = head_at<T>(b.dv, b.dv_stride, same.sequence.batch, same.k_row, same.head);
    Math::store(dv, own_v, to, b.dv_stride.seq, same.keys, p.head_dim_v, 1.0f,
                launch.grads_aligned);
  }
  if (spoiled != 0) {
    repair_dkv<T, kBlockM, kPart != Part::kDV, kPart != Part::kDK>(launch, warp_row, spoiled);
  }
}

template <class Math, int kHeadDim, Scores kScores>
void launch_gradients(AttnBwdLaunch params, const Device& device, const std::string& shape) {
  using T = typename Math::T;
  using Size = BwdTile<Math, kHeadDim>;
  const AttnFwdParams& p = params.params.fwd;
  params.order = make_work_order(p, Size::kBlockM, sizeof(T));
  Grid grid{params.order.items(), 1, 1, Size::kThreads, Size::kDQBytes};
  launch(attn_bwd_dq_kernel<Math, kHeadDim, kScores>, grid, params, device,
         "attn_bwd_dq of " + shape);
  params.order = make_key_order(p, Size::kBlockM, sizeof(T));
  grid.x = params.order.items();
  grid.shared_bytes = Size::kDKVBytes;
  const std::string what = "attn_bwd_dkv of " + shape;
  if constexpr (kHeadDim <= 128) {
    launch(attn_bwd_dkv_kernel<Math, kHeadDim, kScores, Part::kBoth>, grid, params, device, what);
  } else {
    launch(attn_bwd_dkv_kernel<Math, kHeadDim, kScores, Part::kDV>, grid, params, device, what);
    launch(attn_bwd_dkv_kernel<Math, kHeadDim, kScores, Part::kDK>, grid, params, device, what);
  }
}

template <class Math, int kHeadDim>
void launch_attn_bwd(const AttnBwdParams& b, void* workspace, const Device& device) {
  using T = typename Math::T;
  const AttnFwdParams& p = b.fwd;
  AttnBwdLaunch params{};
  params.params = b;
  params.lse = static_cast<float*>(workspace);
  params.delta = params.lse + p.batch * p.heads_q * p.seqlen_q;
  params.aligned = rows_aligned<T>(p.q, p.q_stride, p.head_dim) &&
                   rows_aligned<T>(p.k, p.k_stride, p.head_dim) &&
                   rows_aligned<T>(p.v, p.v_stride, p.head_dim_v) &&
                   rows_aligned<T>(b.dout, b.dout_stride, p.head_dim_v);
  params.grads_aligned = rows_aligned<T>(b.dq, b.dq_stride, p.head_dim) &&
                         rows_aligned<T>(b.dk, b.dk_stride, p.head_dim) &&
                         rows_aligned<T>(b.dv, b.dv_stride, p.head_dim_v);
  const std::string shape = describe(p);
  launch(attn_bwd_prep_kernel<T>, WarpRow::grid(p), params, device, "attn_bwd_prep of " + shape);
  if (b.dsinks) {
    launch(attn_bwd_dsinks_kernel, {p.heads_q, 1, 1, 32}, params, device,
           "attn_bwd_dsinks of " + shape);
  }

  if constexpr (sizeof(T) == 2) {
    if (!is_rich(p)) return launch_gradients<Math, kHeadDim, Scores::kPlain>(params, device, shape);
  }
  launch_gradients<Math, kHeadDim, Scores::kRich>(params, device, shape);
}

template <class Math>
void launch_attn_bwd(const AttnBwdParams& b, void* workspace, const Device& device) {
  const int64_t head_dim = greater(b.fwd.head_dim, b.fwd.head_dim_v);
  if (head_dim <= 64) return launch_attn_bwd<Math, 64>(b, workspace, device);
  if (head_dim <= 128) return launch_attn_bwd<Math, 128>(b, workspace, device);
  launch_attn_bwd<Math, 256>(b, workspace, device);
}

}  // namespace fastattn::cuda
