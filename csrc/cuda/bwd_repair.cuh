// Keeps what is hidden out of gradients, NaN included, as repair.cuh does for outputs.
//
// A hidden score has P = dS = 0, but 0 · NaN is NaN: where K is not finite, dS·K spreads it to rows
// of dQ that do not see it, and dO and Q spread theirs to rows of dV and dK. Rows that come out not
// finite are computed again from what sees them, a warp to a row. The loops pay nothing for it.
#pragma once

#include "bwd_gradients.cuh"
#include "key_block.cuh"
#include "query_tile.cuh"
#include "repair.cuh"

namespace fastattn::cuda {

// Rows of two tensors, and which of their columns are there.
template <class T>
struct RowPair {
  const T *a, *b;
  int64_t a_stride, b_stride;
  int a_cols, b_cols;

  FASTATTN_DEVICE RowPair row(int64_t i) const {
    return {a + i * a_stride, b + i * b_stride, a_stride, b_stride, a_cols, b_cols};
  }
};

// Sums over a row of the score matrix, or one of its transpose, whose own rows are `own`: Σ dS·A
// and Σ P·B over the `others` that it sees. Of the columns each lane has every 32nd.
template <class T, Rows kRows>
class RowSums {
 public:
  // [begin, end) of the others, with lse and delta of each score's query as stats(other).
  template <class Stats>
  FASTATTN_DEVICE void add(const Gradients<T, kRows, false>& gradients, const KernelWindow& window,
                           int own_index, const RowPair<T>& own, const RowPair<T>& others,
                           int begin, int end, const Stats& stats) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = begin; first < end && !hopeless(others); first += 32) {
      const int other = first + lane;
      float weight_here = 0.0f, dscore_here = 0.0f;
      if (other < end) {
        const RowPair<T> row = others.row(other);
        weight_here = dot(own.a, row.a, row.a_cols);
        dscore_here = dot(own.b, row.b, row.b_cols);
        gradients.apply_alone(weight_here, dscore_here, window, {own_index, other}, stats(other));
      }
#pragma unroll 1
      for (int j = 0; j < 32; j++) {
        const float weight = __shfl_sync(0xffffffffu, weight_here, j);
        const float dscore = __shfl_sync(0xffffffffu, dscore_here, j);
        const RowPair<T> row = others.row(first + j);  // looked at where it weighs something
        if (dscore != 0.0f) multiply_add(a_, dscore, row.a, row.a_cols);
        if (weight != 0.0f) multiply_add(b_, weight, row.b, row.b_cols);
      }
    }
  }

  FASTATTN_DEVICE void store_a(T* to, int cols, float factor) const { store(a_, to, cols, factor); }
  FASTATTN_DEVICE void store_b(T* to, int cols) const { store(b_, to, cols, 1.0f); }

 private:
  static constexpr int kColumns = 256 / 32;

  FASTATTN_DEVICE static float dot(const T* x, const T* y, int count) {
    float sum = 0.0f;
#pragma unroll 1
    for (int d = 0; d < count; d++) sum += to_float(x[d]) * to_float(y[d]);
    return sum;
  }
  FASTATTN_DEVICE static void multiply_add(float (&sums)[kColumns], float x, const T* row,
                                           int cols) {
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      const int column = threadIdx.x % 32 + 32 * c;
      if (column < cols) sums[c] += x * to_float(row[column]);
    }
  }
  FASTATTN_DEVICE static void store(const float (&sums)[kColumns], T* to, int cols, float factor) {
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      const int column = threadIdx.x % 32 + 32 * c;
      if (column < cols) store_element(to + column, sums[c] * factor);
    }
  }

  // No column is finite any more: by right, and nothing further changes that. A loss that is NaN
  // makes all gradients so; they would take long to compute again.
  FASTATTN_DEVICE bool hopeless(const RowPair<T>& others) const {
    bool finite = false;
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
      const int column = threadIdx.x % 32 + 32 * c;
      finite |= column < others.a_cols && 0.0f * a_[c] == 0.0f;
      finite |= kRows == Rows::kKeys && column < others.b_cols && 0.0f * b_[c] == 0.0f;
    }
    return !__any_sync(0xffffffffu, finite);
  }

  float a_[kColumns] = {}, b_[kColumns] = {};
};

// q and dO of a query head, k and v of a KV head, from a sequence's row on.
template <class T>
FASTATTN_DEVICE RowPair<T> query_rows(const AttnBwdParams& b, const Sequence& s, int head) {
  const AttnFwdParams& p = b.fwd;
  return {head_at<const T>(p.q, p.q_stride, s.batch, s.q_row, head),
          head_at<const T>(b.dout, b.dout_stride, s.batch, s.q_row, head),
          p.q_stride.seq,
          b.dout_stride.seq,
          static_cast<int>(p.head_dim),
          static_cast<int>(p.head_dim_v)};
}
template <class T>
FASTATTN_DEVICE RowPair<T> key_rows(const AttnFwdParams& p, const Sequence& s, int head) {
  return {head_at<const T>(p.k, p.k_stride, s.batch, s.k_row, head),
          head_at<const T>(p.v, p.v_stride, s.batch, s.k_row, head),
          p.k_stride.seq,
          p.v_stride.seq,
          static_cast<int>(p.head_dim),
          static_cast<int>(p.head_dim_v)};
}

// A row of dQ, after it has been written.
template <class T>
__device__ __noinline__ void repair_dq(const AttnBwdLaunch& launch, int batch, int head,
                                       int query) {
  const AttnBwdParams& b = launch.params;
  const AttnFwdParams& p = b.fwd;
  const Sequence s = sequence_at(p, batch);
  const Window window = make_window(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right);
  const Range seen = keys_seen_by_any(window, {query, query + 1});
  const Gradients<T, Rows::kQueries, false> gradients(b, s, window, head);
  const RowPair<T> queries = query_rows<T>(b, s, head);
  const RowPair<T> keys = key_rows<T>(p, s, head / launch.order.group_size);
  const int64_t at = (int64_t{batch} * p.heads_q + head) * p.seqlen_q + query;
  const float2 stats = make_float2(launch.lse[at], launch.delta[at]);
  RowSums<T, Rows::kQueries> sums;
  sums.add(gradients, KernelWindow(window), query, queries.row(query), keys,
           static_cast<int>(seen.begin), static_cast<int>(seen.end), [&](int) { return stats; });
  __syncwarp();  // what is written over came from other lanes
  sums.store_a(head_at<T>(b.dq, b.dq_stride, s.batch, s.q_row + query, head), queries.a_cols,
               p.scale);
}

// Rows of dK, dV or both.
template <class T, int kBlockM, bool kDK, bool kDV>
__device__ __noinline__ void repair_dkv(const AttnBwdLaunch& launch, int warp_row, uint32_t rows) {
  const AttnBwdParams& b = launch.params;
  const AttnFwdParams& p = b.fwd;
  const KeyBlock block(p, launch.order, kBlockM);
  const Sequence& s = block.sequence;
  const RowPair<T> keys = key_rows<T>(p, s, block.head);
  __syncwarp();
#pragma unroll 1
  for (; rows != 0; rows &= rows - 1) {
    const int row = warp_row + __ffs(static_cast<int>(rows)) - 1, key = block.first + row;
    if (row >= block.keys) continue;
    RowSums<T, Rows::kKeys> sums;
    const int first_head = block.head * launch.order.group_size;
#pragma unroll 1
    for (int head = first_head; head < first_head + launch.order.group_size; head++) {
      const Gradients<T, Rows::kKeys, false> gradients(b, s, block.window, head);
      const int64_t head_row = (int64_t{block.batch} * p.heads_q + head) * p.seqlen_q;
      sums.add(gradients, block.seen_by(), key, keys.row(key), query_rows<T>(b, s, head),
               block.query_begin, block.query_end, [&](int query) {
                 return make_float2(launch.lse[head_row + query], launch.delta[head_row + query]);
               });
    }
    const int64_t to = block.k_row + row;
    if (kDK) {
      sums.store_a(head_at<T>(b.dk, b.dk_stride, s.batch, to, block.head), keys.a_cols, p.scale);
    }
    if (kDV) sums.store_b(head_at<T>(b.dv, b.dv_stride, s.batch, to, block.head), keys.b_cols);
  }
}

}  // namespace fastattn::cuda
