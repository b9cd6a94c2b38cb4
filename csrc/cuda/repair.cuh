// Keeps what is hidden from having influence, NaN included.
//
// A hidden key has weight 0, but 0 · NaN is NaN: where V is not finite, P·V spreads it to rows that
// do not see it. Such rows come out not finite though their lse is a number; they are computed
// again over the keys they see, slowly, a warp to a row. The loop over keys pays nothing for it.
#pragma once

#include "elements.cuh"
#include "query_tile.cuh"
#include "score_mods.cuh"

namespace fastattn::cuda {

FASTATTN_DEVICE void store_element(float* to, float x) { *to = x; }
template <class T>
FASTATTN_DEVICE void store_element(T* to, float x) {
  to->bits = static_cast<uint16_t>(ptx::pack(x, 0.0f, T{}));
}

// Whether any key may be hidden. (Behind the end of a packed sequence lies the next one, which
// sm_90's tiles hold and hide too.)
FASTATTN_HD inline bool hides_keys(const AttnFwdParams& p) {
  return p.mask || p.cu_seqlens_k || p.window_left >= 0 || p.window_right >= 0;
}

// Bit r is set where row r of this warp's tile is not finite, and hides keys.
template <int kM, int kD>
FASTATTN_DEVICE uint32_t spoiled_rows(const AttnFwdParams& p, const float (&out)[kM][kD][4]) {
  if (!hides_keys(p)) return 0;
  const int lane = threadIdx.x % 32;
  uint32_t rows = 0;
#pragma unroll
  for (int m = 0; m < kM; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float zero = 0.0f;  // 0, or NaN where any is not finite
#pragma unroll
      for (int d = 0; d < kD; d++) {
        zero += 0.0f * out[m][d][2 * half] + 0.0f * out[m][d][2 * half + 1];
      }
      if (zero != 0.0f) rows |= 1u << (16 * m + 8 * half + lane / 4);
    }
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) rows |= __shfl_xor_sync(0xffffffffu, rows, lanes);
  return rows;
}

// Row `row` of the tile from the keys it sees and the lse it has: by a whole warp, lanes beside
// each other for keys and then for columns of V.
template <class T>
FASTATTN_DEVICE void attend_visible(const AttnFwdParams& p, const QueryTile& tile, int row) {
  const int lane = threadIdx.x % 32, query = tile.first + row, head_dim_v = p.head_dim_v;
  const float lse =
      p.lse[tile.batch * p.lse_stride_batch + tile.head * p.lse_stride_head + tile.q_row + row];
  if (lse != lse) return;  // NaN by right
  const Sequence& s = tile.sequence;
  const T* q = head_at<const T>(p.q, p.q_stride, s.batch, tile.q_row + row, tile.head);
  const T* k = head_at<const T>(p.k, p.k_stride, s.batch, s.k_row, tile.head_k);
  const T* v = head_at<const T>(p.v, p.v_stride, s.batch, s.k_row, tile.head_k);
  const ScoreMods<T> mods(p, tile.sequence, tile.window, tile.head);

  constexpr int kColumns = 256 / 32;  // lane + 32·c
  float out[kColumns] = {};
  const Range keys = keys_seen_by_any(tile.window, {query, query + 1});
#pragma unroll 1
  for (int64_t first = keys.begin; first < keys.end; first += 32) {
    const int64_t key = first + lane;
    float weight = 0.0f;
    bool visible = false;
    if (key < keys.end) {
      float score[1][1][4] = {};
#pragma unroll 1
      for (int d = 0; d < p.head_dim; d++) {
        score[0][0][0] += to_float(q[d]) * to_float(k[key * p.k_stride.seq + d]);
      }
      const Position at{query, static_cast<int>(key)};
      mods.apply(score, at);
      visible = score[0][0][0] != -INFINITY;
      if (mods.keeps(at)) weight = ptx::ex2((score[0][0][0] - lse) * kLog2E);
    }
#pragma unroll 1
    for (int j = 0; j < 32; j++) {
      const float w = __shfl_sync(0xffffffffu, weight, j);
      if (!__shfl_sync(0xffffffffu, static_cast<int>(visible), j)) continue;
      const T* values = v + (first + j) * p.v_stride.seq;
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        if (lane + 32 * c < head_dim_v) out[c] += w * to_float(values[lane + 32 * c]);
      }
    }
  }
  T* to = head_at<T>(p.out, p.out_stride, s.batch, tile.q_row + row, tile.head);
  const float kept = p.seed ? p.dropout_scale : 1.0f;
#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (lane + 32 * c < head_dim_v) store_element(to + lane + 32 * c, out[c] * kept);
  }
}

// After the outputs and lse of the tile are written. A call of its own, and the tile found again,
// so that the loop over keys keeps nothing in registers for it.
template <class T, int kBlockM>
__device__ __noinline__ void repair_rows(const AttnFwdLaunch& launch, int warp_row, uint32_t rows) {
  const QueryTile tile(launch.params, launch.order, kBlockM, 1);
  __syncwarp();  // lse and the outputs that are to be written over came from other lanes
#pragma unroll 1
  for (; rows != 0; rows &= rows - 1) {
    const int row = warp_row + __ffs(static_cast<int>(rows)) - 1;
    if (row < tile.rows) attend_visible<T>(launch.params, tile, row);
  }
}

// The same for all tiles of a block of threads that goes from one to the next, when it is done: a
// call between tiles would have its registers saved in local memory. Rows 16 a warp; which of them
// are spoiled is seen by their outputs.
template <class T, int kBlockM>
__device__ __noinline__ void repair_tiles(const AttnFwdLaunch& launch, int warp_row) {
  const AttnFwdParams& p = launch.params;
  __syncwarp();
#pragma unroll 1
  for (int round = 0; true; round++) {
    const int item = WorkOrder::nth_item(round, blockIdx.x, gridDim.x);
    if (item >= launch.order.items()) break;
    const QueryTile tile(p, launch.order, kBlockM, 1, item);
#pragma unroll 1
    for (int row = warp_row; row < min(warp_row + 16, tile.rows); row++) {
      const T* out =
          head_at<const T>(p.out, p.out_stride, tile.sequence.batch, tile.q_row + row, tile.head);
      float zero = 0.0f;  // or NaN
#pragma unroll 1
      for (int d = threadIdx.x % 32; d < p.head_dim_v; d += 32) zero += 0.0f * to_float(out[d]);
      if (__any_sync(0xffffffffu, zero != 0.0f)) attend_visible<T>(p, tile, row);
    }
  }
}

}  // namespace fastattn::cuda
