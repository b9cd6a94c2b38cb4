// Which keys a block of threads of the backward owns, and which queries see them: the counterpart
// of QueryTile.
#pragma once

#include "../block_range.h"
#include "score_mods.cuh"
#include "work_order.cuh"

namespace fastattn::cuda {

// Keys [first, first + keys) of one KV head.
struct KeyBlock {
  int batch, head;  // of keys and values
  int first, keys;  // keys ≤ 0: the sequence ends before
  int64_t k_row;    // of `first` in k, v, dk and dv
  int query_begin, query_end;
  Sequence sequence;
  Window window;

  FASTATTN_DEVICE KeyBlock(const AttnFwdParams& p, const WorkOrder& order, int block_keys,
                           int index = blockIdx.x) {
    const WorkOrder::Item work = order.item(index);
    sequence = sequence_at(p, work.batch);
    window = make_window(sequence.seqlen_q, sequence.seqlen_k, p.window_left, p.window_right);
    batch = work.batch;
    head = work.head;
    first = work.m_block * block_keys;
    keys = min(block_keys, static_cast<int>(sequence.seqlen_k) - first);
    k_row = sequence.k_row + first;
    const KernelWindow queries = seen_by();
    query_begin = max(0, first + queries.first);
    query_end = min(queries.seqlen_k, first + keys - 1 + queries.end);
  }

  // The window from the keys' side.
  FASTATTN_DEVICE KernelWindow seen_by() const {
    return KernelWindow(window).transposed(static_cast<int>(sequence.seqlen_q));
  }
};

}  // namespace fastattn::cuda
