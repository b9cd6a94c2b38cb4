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
#include "bwd_math.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "query_tile.cuh"
#include "repair.cuh"
#include "score_mods.cuh"
#include "work_order.cuh"

namespace fastattn::cuda {

struct AttnBwdLaunch {
  AttnBwdParams params;
  WorkOrder order;
  float *lse, *delta;  // (B, H_q, S_q): lse is +inf where a row saw no key
  bool aligned;        // rows of q, k, v, dout can be moved 16 bytes at a time
};

// What becomes of fragments of S and dP; one of the kernels that see a score adds up dbias.
template <class T, Rows kRows, bool kAddsBias = kRows == Rows::kQueries>
class Gradients {
 public:
  FASTATTN_DEVICE Gradients(const AttnBwdParams& b, const Sequence& s, const Window& window,
                            int head)
      : b_(b), head_(head), batch_(s.batch), mods_(b.fwd, s, window, head) {}

  // From raw products and dP, with lse and delta of element (m, n, half, e)'s query as
  // stats(n, half, e): `weights` become P after dropout, `dweights` dS before scale.
  template <int kN, class Stats>
  FASTATTN_DEVICE void apply(float (&weights)[1][kN][4], float (&dweights)[1][kN][4],
                             const KernelWindow& window, bool inside, Position at,
                             const Stats& stats) const {
    const AttnFwdParams& p = b_.fwd;
    mods_.cap(weights);
    float slopes[1][kN][4] = {};
    if (p.softcap > 0) {
      const float per_cap = 1.0f / p.softcap;
      for_each_element(slopes, [&](float& slope, int m, int n, int half, int e) {
        const float t = weights[m][n][2 * half + e] * per_cap;
        slope = 1.0f - t * t;
      });
    }
    mods_.add(weights, at);
    if (!inside) hide_outside(weights, window, at);
    float kept[1][kN][4] = {};  // 0, or what is kept is multiplied by
    if (p.seed) {
      for_each_element(kept, [&](float& factor, int, int, int, int) { factor = p.dropout_scale; });
      mods_.drop(kept, at);
      for_each_element(dweights, [&](float& dweight, int m, int n, int half, int e) {
        dweight *= kept[m][n][2 * half + e];
      });
    }
    for_each_element(weights, [&](float& weight, int m, int n, int half, int e) {
      const float2 lse_delta = stats(n, half, e);
      float& dweight = dweights[m][n][2 * half + e];
      const bool hidden = weight == -INFINITY;
      const float prob = ptx::ex2((weight - lse_delta.x) * kLog2E);
      const float dscore = prob * (dweight - lse_delta.y);
      weight = hidden ? 0.0f : prob;
      dweight = hidden ? 0.0f : dscore;  // NaN of what is hidden stays behind
    });
    if (p.seed) {
      for_each_element(weights, [&](float& weight, int m, int n, int half, int e) {
        weight *= kept[m][n][2 * half + e];
      });
    }
    if (kAddsBias && b_.dbias) add_dbias(dweights, at);
    if (p.softcap > 0) {
      for_each_element(dweights, [&](float& d, int m, int n, int half, int e) {
        d *= slopes[m][n][2 * half + e];
      });
    }
  }

 private:
  // Elements of dbias that several scores share are summed in no particular order.
  template <int kN>
  FASTATTN_DEVICE void add_dbias(float (&dscores)[1][kN][4], Position at) const {
    const ScoreStrides stride = ScoreMods<T, kRows>::oriented(b_.dbias_stride);
    float* dbias = b_.dbias + batch_ * stride.batch + head_ * stride.head + at.row * stride.row +
                   at.column * stride.col;
    mods_.for_each_there(dscores, at, [&](float& d, int row, int column) {
      if (d != 0.0f) atomicAdd(dbias + row * stride.row + column * stride.col, d);
    });
  }

  const AttnBwdParams& b_;
  const int head_;
  const int64_t batch_;
  const ScoreMods<T, kRows> mods_;
};

// Rows warp_row … of a tile that has `rows`, times `factor`.
template <class T, int kD>
FASTATTN_DEVICE void store_gradient(const float (&grad)[1][kD][4], T* to, int64_t stride,
                                    int warp_row, int rows, int cols, float factor) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = warp_row + lane / 4 + 8 * half;
    if (r >= rows) continue;
#pragma unroll
    for (int d = 0; d < kD; d++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int c = 8 * d + lane % 4 * 2 + e;
        if (c < cols) store_element(to + r * stride + c, grad[0][d][2 * half + e] * factor);
      }
    }
  }
}

// lse and delta of a query; a row that is not there has P = 0 by an lse of +inf.
FASTATTN_DEVICE float2 stats_at(const float* lse, const float* delta, int query, int end) {
  if (query >= end) return make_float2(INFINITY, 0.0f);
  return make_float2(lse[query], delta[query]);
}

// delta and lse, a warp to a row. Grid: rows, heads, batch.
template <class T>
__global__ void __launch_bounds__(128)
    attn_bwd_prep_kernel(const __grid_constant__ AttnBwdLaunch launch) {
  const AttnBwdParams& b = launch.params;
  const AttnFwdParams& p = b.fwd;
  const int head = blockIdx.y, batch = blockIdx.z, lane = threadIdx.x % 32;
  const int query = blockIdx.x * 4 + threadIdx.x / 32;
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
      sum -= ptx::ex2((sink - launch.lse[first + i]) * kLog2E) * launch.delta[first + i];
    }
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (lane == 0) launch.params.dsinks[head] = sum;
}

template <class Math, int kHeadDim>
__global__ void __launch_bounds__(BwdTile<Math, kHeadDim>::kThreads, 1)
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
  const auto sK = Math::template tile<kHeadDim>(shared + 2 * kBlockM * Size::kRowBytes);
  const auto sV = Math::template tile<kHeadDim>(shared + (2 * kBlockM + kBlockN) * Size::kRowBytes);
  const TileSource<T> gQ{head_at<const T>(p.q, p.q_stride, s.batch, tile.q_row, tile.head),
                         p.q_stride.seq, head_dim, launch.aligned};
  const TileSource<T> gDO{head_at<const T>(b.dout, b.dout_stride, s.batch, tile.q_row, tile.head),
                          b.dout_stride.seq, head_dim_v, launch.aligned};
  const TileSource<T> gK{head_at<const T>(p.k, p.k_stride, s.batch, s.k_row, tile.head_k),
                         p.k_stride.seq, head_dim, launch.aligned};
  const TileSource<T> gV{head_at<const T>(p.v, p.v_stride, s.batch, s.k_row, tile.head_k),
                         p.v_stride.seq, head_dim_v, launch.aligned};
  Math::template copy<kBlockM, kThreads>(sQ, gQ, 0, tile.rows);
  Math::template copy<kBlockM, kThreads>(sDO, gDO, 0, tile.rows);

  const int warp_row = threadIdx.x / 32 * 16, first_query = tile.first + warp_row;
  const int64_t head_row = (int64_t{tile.batch} * p.heads_q + tile.head) * p.seqlen_q;
  const int row = first_query + threadIdx.x % 32 / 4, seqlen_q = static_cast<int>(s.seqlen_q);
  const float2 stats[2] = {
      stats_at(launch.lse + head_row, launch.delta + head_row, row, seqlen_q),
      stats_at(launch.lse + head_row, launch.delta + head_row, row + 8, seqlen_q)};
  const Gradients<T, Rows::kQueries> gradients(b, s, tile.window, tile.head);
  float dq[1][kD][4];
  clear(dq);

  for (int n_block = tile.n_block_min; n_block < tile.n_block_end; n_block++) {
    const int first_key = n_block * kBlockN;
    __syncthreads();  // nobody reads the K and V before
    Math::template copy<kBlockN, kThreads>(sK, gK, first_key, window.seqlen_k);
    Math::template copy<kBlockN, kThreads>(sV, gV, first_key, window.seqlen_k);
    Math::finish_copies();
    __syncthreads();
    float weights[1][kN][4], dweights[1][kN][4];
    Math::rows(weights, sQ, warp_row, sK);
    Math::rows(dweights, sDO, warp_row, sV);
    const bool inside =
        window.shows({first_query, first_query + 16}, {first_key, first_key + kBlockN});
    gradients.apply(weights, dweights, window, inside, thread_position(first_query, first_key),
                    [&](int, int half, int) { return stats[half]; });
    Math::add(dq, dweights, sK);
  }
  Math::finish_copies();  // where no key was seen
  store_gradient(dq, head_at<T>(b.dq, b.dq_stride, s.batch, tile.q_row, tile.head), b.dq_stride.seq,
                 warp_row, tile.rows, head_dim, p.scale);
}

// Which of dK and dV a launch computes: where registers hold only one of them, there are two.
enum class Part { kBoth, kDK, kDV };

template <class Math, int kHeadDim, Part kPart>
__global__ void __launch_bounds__(BwdTile<Math, kHeadDim>::kThreads, 1)
    attn_bwd_dkv_kernel(const __grid_constant__ AttnBwdLaunch launch) {
  using T = typename Math::T;
  using Size = BwdTile<Math, kHeadDim>;
  constexpr int kBlockM = Size::kBlockM, kBlockN = Size::kBlockN, kThreads = Size::kThreads;
  constexpr int kN = kBlockN / 8, kD = kHeadDim / 8;
  const AttnBwdParams& b = launch.params;
  const AttnFwdParams& p = b.fwd;
  const WorkOrder::Item work = launch.order.item(blockIdx.x);  // of KV heads and blocks of keys
  const Sequence s = sequence_at(p, work.batch);
  const int seqlen_q = static_cast<int>(s.seqlen_q), seqlen_k = static_cast<int>(s.seqlen_k);
  const int first_key = work.m_block * kBlockM, keys = min(kBlockM, seqlen_k - first_key);
  if (keys <= 0) return;
  const Window window = make_window(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right);
  const KernelWindow seen_by = KernelWindow(window).transposed(seqlen_q);
  const int query_begin = max(0, first_key + seen_by.first);
  const int query_end = min(seqlen_q, first_key + keys - 1 + seen_by.end);
  const int head_dim = p.head_dim, head_dim_v = p.head_dim_v;
  const int64_t k_row = s.k_row + first_key;

  FASTATTN_SHARED(shared);
  const auto sK = Math::template tile<kHeadDim>(shared);
  const auto sV = Math::template tile<kHeadDim>(shared + kBlockM * Size::kRowBytes);
  const auto sQ = Math::template tile<kHeadDim>(shared + 2 * kBlockM * Size::kRowBytes);
  const auto sDO =
      Math::template tile<kHeadDim>(shared + (2 * kBlockM + kBlockN) * Size::kRowBytes);
  const TileSource<T> gK{head_at<const T>(p.k, p.k_stride, s.batch, k_row, work.head),
                         p.k_stride.seq, head_dim, launch.aligned};
  const TileSource<T> gV{head_at<const T>(p.v, p.v_stride, s.batch, k_row, work.head),
                         p.v_stride.seq, head_dim_v, launch.aligned};
  Math::template copy<kBlockM, kThreads>(sK, gK, 0, keys);
  Math::template copy<kBlockM, kThreads>(sV, gV, 0, keys);

  const int warp_row = threadIdx.x / 32 * 16, warp_key = first_key + warp_row;
  float dk[1][kPart == Part::kDV ? 1 : kD][4], dv[1][kPart == Part::kDK ? 1 : kD][4];
  clear(dk);
  clear(dv);
  const int first_head = work.head * launch.order.group_size;
#pragma unroll 1
  for (int head = first_head; head < first_head + launch.order.group_size; head++) {
    const TileSource<T> gQ{head_at<const T>(p.q, p.q_stride, s.batch, s.q_row, head),
                           p.q_stride.seq, head_dim, launch.aligned};
    const TileSource<T> gDO{head_at<const T>(b.dout, b.dout_stride, s.batch, s.q_row, head),
                            b.dout_stride.seq, head_dim_v, launch.aligned};
    const int64_t head_row = (int64_t{work.batch} * p.heads_q + head) * p.seqlen_q;
    const Gradients<T, Rows::kKeys> gradients(b, s, window, head);
#pragma unroll 1
    for (int query = query_begin / kBlockN * kBlockN; query < query_end; query += kBlockN) {
      __syncthreads();  // nobody reads the Q and dO before
      Math::template copy<kBlockN, kThreads>(sQ, gQ, query, seqlen_q);
      Math::template copy<kBlockN, kThreads>(sDO, gDO, query, seqlen_q);
      Math::finish_copies();
      __syncthreads();
      float weights[1][kN][4], dweights[1][kN][4];
      Math::rows(weights, sK, warp_row, sQ);
      Math::rows(dweights, sV, warp_row, sDO);
      const bool inside = seen_by.shows({warp_key, warp_key + 16}, {query, query + kBlockN});
      const Position at = thread_position(warp_key, query);
      gradients.apply(weights, dweights, seen_by, inside, at, [&](int n, int, int e) {
        return stats_at(launch.lse + head_row, launch.delta + head_row, at.column + 8 * n + e,
                        seqlen_q);
      });
      if constexpr (kPart != Part::kDK) Math::add(dv, weights, sDO);
      if constexpr (kPart != Part::kDV) Math::add(dk, dweights, sQ);
    }
  }
  Math::finish_copies();  // where no query saw them
  if constexpr (kPart != Part::kDV) {
    store_gradient(dk, head_at<T>(b.dk, b.dk_stride, s.batch, k_row, work.head), b.dk_stride.seq,
                   warp_row, keys, head_dim, p.scale);
  }
  if constexpr (kPart != Part::kDK) {
    store_gradient(dv, head_at<T>(b.dv, b.dv_stride, s.batch, k_row, work.head), b.dv_stride.seq,
                   warp_row, keys, head_dim_v, 1.0f);
  }
}

template <class Math, int kHeadDim>
void launch_attn_bwd(const AttnBwdParams& b, void* workspace, const Device& device) {
  using T = typename Math::T;
  using Size = BwdTile<Math, kHeadDim>;
  const AttnFwdParams& p = b.fwd;
  AttnBwdLaunch params{};
  params.params = b;
  params.lse = static_cast<float*>(workspace);
  params.delta = params.lse + p.batch * p.heads_q * p.seqlen_q;
  params.aligned = rows_aligned<T>(p.q, p.q_stride, p.head_dim) &&
                   rows_aligned<T>(p.k, p.k_stride, p.head_dim) &&
                   rows_aligned<T>(p.v, p.v_stride, p.head_dim_v) &&
                   rows_aligned<T>(b.dout, b.dout_stride, p.head_dim_v);
  const std::string shape = describe(p);
  launch(attn_bwd_prep_kernel<T>, {ceil_div(p.seqlen_q, 4), p.heads_q, p.batch, 128}, params,
         device, "attn_bwd_prep of " + shape);
  if (b.dsinks) {
    launch(attn_bwd_dsinks_kernel, {p.heads_q, 1, 1, 32}, params, device,
           "attn_bwd_dsinks of " + shape);
  }

  params.order = make_work_order(p, Size::kBlockM, sizeof(T));
  launch(attn_bwd_dq_kernel<Math, kHeadDim>,
         {params.order.items(), 1, 1, Size::kThreads, Size::kSharedBytes}, params, device,
         "attn_bwd_dq of " + shape);
  params.order = make_key_order(p, Size::kBlockM, sizeof(T));
  const Grid grid{params.order.items(), 1, 1, Size::kThreads, Size::kSharedBytes};
  if constexpr (kHeadDim <= 128) {
    launch(attn_bwd_dkv_kernel<Math, kHeadDim, Part::kBoth>, grid, params, device,
           "attn_bwd_dkv of " + shape);
  } else {
    launch(attn_bwd_dkv_kernel<Math, kHeadDim, Part::kDV>, grid, params, device,
           "attn_bwd_dkv of " + shape);
    launch(attn_bwd_dkv_kernel<Math, kHeadDim, Part::kDK>, grid, params, device,
           "attn_bwd_dkv of " + shape);
  }
}

template <class Math>
void launch_attn_bwd(const AttnBwdParams& b, void* workspace, const Device& device) {
  const int64_t head_dim = greater(b.fwd.head_dim, b.fwd.head_dim_v);
  if (head_dim <= 64) return launch_attn_bwd<Math, 64>(b, workspace, device);
  if (head_dim <= 128) return launch_attn_bwd<Math, 128>(b, workspace, device);
  launch_attn_bwd<Math, 256>(b, workspace, device);
}

}  // namespace fastattn::cuda
