// What the forward kernels share around their main loop: which queries and keys a block of threads
// owns, and what becomes of its rows at the end.
#pragma once

#include <string>

#include "../block_range.h"
#include "elements.cuh"
#include "score_mods.cuh"
#include "softmax.cuh"
#include "work_order.cuh"

namespace fastattn::cuda {

struct AttnFwdLaunch {
  AttnFwdParams params;
  WorkOrder order;
  bool qkv_aligned, out_aligned;  // rows can be moved 16 bytes at a time
};

// The first row of a head, `row` rows into one batch entry.
template <class T>
FASTATTN_DEVICE T* head_at(const void* tensor, const Strides& stride, int64_t batch, int64_t row,
                           int64_t head) {
  return static_cast<T*>(const_cast<void*>(tensor)) + batch * stride.batch + row * stride.seq +
         head * stride.head;
}

// Queries [first, first + rows) of one head, and the blocks of keys that they see.
struct QueryTile {
  int batch, head, head_k;
  int first, rows;  // rows ≤ 0: the sequence ends before
  int q_row;        // of `first` in q, out and lse
  int n_block_min, n_block_end;
  Sequence sequence;
  Window window;

  // `index`: which of the order's items.
  FASTATTN_DEVICE QueryTile(const AttnFwdParams& p, const WorkOrder& order, int block_m,
                            int block_n, int index = blockIdx.x) {
    const WorkOrder::Item work = order.item(index);
    sequence = sequence_at(p, work.batch);
    window = make_window(sequence.seqlen_q, sequence.seqlen_k, p.window_left, p.window_right);
    batch = work.batch;
    head = work.head;
    head_k = work.head / order.group_size;
    first = work.m_block * block_m;
    const Range queries = intersect({first, first + block_m}, {0, sequence.seqlen_q});
    const Range keys = keys_seen_by_any(window, queries);
    rows = static_cast<int>(queries.size());
    q_row = static_cast<int>(sequence.q_row) + first;
    n_block_min = static_cast<int>(keys.begin / block_n);
    n_block_end = keys.empty() ? n_block_min : static_cast<int>(ceil_div(keys.end, block_n));
  }
};

// Writes the lse of rows warp_row … of the tile, and turns sums of weighted values into outputs.
template <int kM, int kD, class Softmax>
FASTATTN_DEVICE void finish_rows(const AttnFwdParams& p, const QueryTile& tile, int warp_row,
                                 const Softmax& softmax, float (&out)[kM][kD][4]) {
  const int lane = threadIdx.x % 32;
  const float sink = p.sinks ? p.sinks[tile.head] : -INFINITY;
  const float kept = p.seed ? p.dropout_scale : 1.0f;
  float* lse = p.lse + tile.batch * p.lse_stride_batch + tile.head * p.lse_stride_head + tile.q_row;
#pragma unroll
  for (int m = 0; m < kM; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const auto row = softmax.finish(m, half, sink);
      const int r = warp_row + 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && r < tile.rows) lse[r] = row.lse;
#pragma unroll
      for (int d = 0; d < kD; d++) {
        out[m][d][2 * half] *= row.factor * kept;
        out[m][d][2 * half + 1] *= row.factor * kept;
      }
    }
  }
}

inline std::string describe(const AttnFwdParams& p) {
  return "attn_fwd, B " + std::to_string(p.batch) + ", S " + std::to_string(p.seqlen_q) + " × " +
         std::to_string(p.seqlen_k) + ", H " + std::to_string(p.heads_q) + " / " +
         std::to_string(p.heads_k) + ", D " + std::to_string(p.head_dim) + " / " +
         std::to_string(p.head_dim_v);
}

}  // namespace fastattn::cuda
