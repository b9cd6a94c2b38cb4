// softmax(scale·QKᵀ …)V in fp32, on any architecture: products by multiply-add, with the same
// ownership of rows, accumulator fragments, softmax and score options as the 16-bit kernels.
//
// Tensor cores would round inputs to 10 bits (tf32). Here a thread multiplies what its fragment
// stands for: rows group and group + 8, columns 2t and 2t + 1 of every 8. For scores, 4 elements of
// its two rows of Q and of its keys at a time; for P·V, a weight comes from the lane of the quad
// that has it. K and V take turns in one buffer, which fits 64 KB of shared memory at any size.
#include "../block_range.h"
#include "attn_fwd.h"
#include "elements.cuh"
#include "fragments.cuh"
#include "launch.cuh"
#include "query_tile.cuh"
#include "repair.cuh"
#include "score_mods.cuh"
#include "softmax.cuh"

namespace fastattn::cuda {
namespace {

// Rows in shared memory are 16 bytes longer than they have elements, so that 8 rows' 16-byte pieces
// lie in 8 different groups of banks.
template <int kCols>
struct FloatTile {
  static constexpr int kStride = kCols + 4;
  float* at;

  FASTATTN_DEVICE float* row(int r) const { return at + r * kStride; }
};

template <int kHeadDim>
struct Fp32Tile {
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kBlockM = 16 * kWarps, kBlockN = kHeadDim <= 128 ? 32 : 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSharedBytes = 4 * FloatTile<kHeadDim>::kStride * (kBlockM + kBlockN);
};

// Rows [first, first + kRows), of which those below `end` are there; zeros elsewhere.
template <int kRows, int kCols, int kThreads>
FASTATTN_DEVICE void copy_rows(const FloatTile<kCols>& tile, const float* rows, int64_t stride,
                               int first, int end, int cols) {
#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * kCols; i += kThreads) {
    const int r = i / kCols, c = i % kCols;
    const bool there = first + r < end && c < cols;
    tile.row(r)[c] = there ? rows[(first + r) * stride + c] : 0.0f;
  }
}

FASTATTN_DEVICE float dot(const float4& a, const float4& b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// scores = Q · Kᵀ for rows `row` … of sQ
template <int kN, int kHeadDim>
FASTATTN_DEVICE void multiply_qk(float (&scores)[1][kN][4], const FloatTile<kHeadDim>& sQ, int row,
                                 const FloatTile<kHeadDim>& sK) {
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  clear(scores);
#pragma unroll 2
  for (int d = 0; d < kHeadDim; d += 4) {
    float4 q[2], k[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      q[half] = *reinterpret_cast<const float4*>(sQ.row(row + group + 8 * half) + d);
    }
#pragma unroll
    for (int n = 0; n < kN; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        k[e] = *reinterpret_cast<const float4*>(sK.row(8 * n + 2 * t + e) + d);
        scores[0][n][e] = dot(q[0], k[e], scores[0][n][e]);
        scores[0][n][2 + e] = dot(q[1], k[e], scores[0][n][2 + e]);
      }
    }
  }
}

// out += weights · V
template <int kN, int kD, int kHeadDim>
FASTATTN_DEVICE void multiply_pv(float (&out)[1][kD][4], const float (&weights)[1][kN][4],
                                 const FloatTile<kHeadDim>& sV) {
  const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kN; n++) {
#pragma unroll
    for (int key = 0; key < 8; key++) {
      const int owner = (lane & ~3) | key / 2, e = key % 2;
      const float p0 = __shfl_sync(0xffffffffu, weights[0][n][e], owner);
      const float p1 = __shfl_sync(0xffffffffu, weights[0][n][2 + e], owner);
      const float* v = sV.row(8 * n + key) + 2 * t;
#pragma unroll
      for (int d = 0; d < kD; d++) {
        const float2 values = *reinterpret_cast<const float2*>(v + 8 * d);
        out[0][d][0] = fmaf(p0, values.x, out[0][d][0]);
        out[0][d][1] = fmaf(p0, values.y, out[0][d][1]);
        out[0][d][2] = fmaf(p1, values.x, out[0][d][2]);
        out[0][d][3] = fmaf(p1, values.y, out[0][d][3]);
      }
    }
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(Fp32Tile<kHeadDim>::kThreads)
    attn_fwd_fp32_kernel(const __grid_constant__ AttnFwdLaunch launch) {
  using Tile = Fp32Tile<kHeadDim>;
  constexpr int kN = Tile::kBlockN / 8, kD = kHeadDim / 8;
  const AttnFwdParams& p = launch.params;
  const QueryTile tile(launch, Tile::kBlockM, Tile::kBlockN);
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
    multiply_qk(scores, sQ, warp_row, sKV);
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
    multiply_pv(out, scores, sKV);
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
