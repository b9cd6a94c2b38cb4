// Index arithmetic of the attention kernels, on CPU and GPU: which rows of the tensors a sequence
// owns, and which keys a tile of queries sees.
#pragma once

#include <cstdint>

#include "params.h"

#ifdef __CUDACC__
#define FASTATTN_HD __host__ __device__
#else
#define FASTATTN_HD
#endif

namespace fastattn {

FASTATTN_HD constexpr int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_HD constexpr int64_t greater(int64_t a, int64_t b) { return a < b ? b : a; }
FASTATTN_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a ≥ 0
FASTATTN_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Range {  // half-open
  int64_t begin, end;
  FASTATTN_HD constexpr int64_t size() const { return end - begin; }
  FASTATTN_HD constexpr bool empty() const { return begin >= end; }
};
FASTATTN_HD constexpr Range intersect(Range a, Range b) {
  return {greater(a.begin, b.begin), lesser(a.end, b.end)};
}

// Where batch entry b lies. Of padded tensors q_row and k_row are 0 and the batch stride leads
// there; of packed ones they are its first tokens and the batch stride is 0.
struct Sequence {
  int64_t batch, q_row, k_row, seqlen_q, seqlen_k;
};
FASTATTN_HD inline Sequence sequence_at(const AttnFwdParams& p, int64_t b) {
  if (p.cu_seqlens_q == nullptr) return {b, 0, 0, p.seqlen_q, p.seqlen_k};
  const int64_t q = p.cu_seqlens_q[b], k = p.cu_seqlens_k[b];
  return {b, q, k, p.cu_seqlens_q[b + 1] - q, p.cu_seqlens_k[b + 1] - k};
}

// Query i stands on key i + diagonal, diagonal = S_k − S_q, and sees `left` keys before it to
// `right` keys behind it. Unlimited sides are S_q + S_k: wide enough, and nothing overflows.
struct Window {
  int64_t seqlen_k, diagonal, left, right;
};
FASTATTN_HD constexpr Window make_window(int64_t seqlen_q, int64_t seqlen_k, int64_t left,
                                         int64_t right) {
  const int64_t all = seqlen_q + seqlen_k;
  return {seqlen_k, seqlen_k - seqlen_q, left < 0 ? all : lesser(left, all),
          right < 0 ? all : lesser(right, all)};
}

// The keys seen by at least one of these queries, and by every one. Either may come out empty.
FASTATTN_HD constexpr Range keys_seen_by_any(const Window& w, Range queries) {
  return intersect({0, w.seqlen_k}, {queries.begin + w.diagonal - w.left,
                                     queries.end - 1 + w.diagonal + w.right + 1});
}
FASTATTN_HD constexpr Range keys_seen_by_all(const Window& w, Range queries) {
  return intersect({0, w.seqlen_k}, {queries.end - 1 + w.diagonal - w.left,
                                     queries.begin + w.diagonal + w.right + 1});
}

}  // namespace fastattn
