// Index arithmetic of the attention kernels: which rows of the tensors a sequence owns, which keys
// a tile of queries sees, and how a block of keys is cut so that most of it needs no masking.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace fastattn::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a ≥ 0
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }

struct Range {  // half-open
  int64_t begin, end;
  constexpr int64_t size() const { return end - begin; }
  constexpr bool empty() const { return begin >= end; }
};
constexpr Range intersect(Range a, Range b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

// Where batch entry b lies. Of padded tensors q_row and k_row are 0 and the batch stride leads
// there; of packed ones they are its first tokens and the batch stride is 0.
struct Sequence {
  int64_t batch, q_row, k_row, seqlen_q, seqlen_k;
};
inline Sequence sequence_at(const AttnFwdParams& p, int64_t b) {
  if (p.cu_seqlens_q == nullptr) return {b, 0, 0, p.seqlen_q, p.seqlen_k};
  const int64_t q = p.cu_seqlens_q[b], k = p.cu_seqlens_k[b];
  return {b, q, k, p.cu_seqlens_q[b + 1] - q, p.cu_seqlens_k[b + 1] - k};
}

// Query i stands on key i + diagonal, diagonal = S_k − S_q, and sees `left` keys before it to
// `right` keys behind it. Unlimited sides are S_q + S_k: wide enough, and nothing overflows.
struct Window {
  int64_t seqlen_k, diagonal, left, right;
};
constexpr Window make_window(int64_t seqlen_q, int64_t seqlen_k, int64_t left, int64_t right) {
  const int64_t all = seqlen_q + seqlen_k;
  return {seqlen_k, seqlen_k - seqlen_q, left < 0 ? all : std::min(left, all),
          right < 0 ? all : std::min(right, all)};
}

// The keys seen by at least one of these queries, and by every one. Either may come out empty.
constexpr Range keys_seen_by_any(const Window& w, Range queries) {
  return intersect({0, w.seqlen_k}, {queries.begin + w.diagonal - w.left,
                                     queries.end - 1 + w.diagonal + w.right + 1});
}
constexpr Range keys_seen_by_all(const Window& w, Range queries) {
  return intersect({0, w.seqlen_k}, {queries.end - 1 + w.diagonal - w.left,
                                     queries.begin + w.diagonal + w.right + 1});
}

// A run of keys against vectors [vec_begin, vec_end) of a tile of queries. If `edge`, the window's
// edge passes through it and lanes need masking; otherwise every query of the tile sees every key
// of it.
struct Segment {
  Range keys;
  int vec_begin, vec_end;  // may be empty
  bool edge;
};

// The first segment of `keys`, which must lie in [0, S_k). Along an edge segments are at most
// `lanes` keys long, and cut so that causal masking drops whole vectors: half the work of a
// diagonal block.
constexpr Segment next_segment(const Window& w, Range queries, int lanes, Range keys) {
  const int vecs = int(ceil_div(queries.size(), lanes));
  const Range interior = keys_seen_by_all(w, queries);
  if (interior.begin <= keys.begin && keys.begin < interior.end) {
    return {{keys.begin, std::min(keys.end, interior.end)}, 0, vecs, false};
  }
  // Key j is seen by the tile's queries first_seer(j) … last_seer(j).
  const int64_t first_seer = keys.begin - w.right - w.diagonal - queries.begin;
  int64_t end = std::min(keys.end, keys.begin + lanes - floor_mod(first_seer, lanes));
  if (keys.begin < interior.begin && interior.begin < interior.end) {
    end = std::min(end, interior.begin);
  }
  const int64_t last_seer = end - 1 + w.left - w.diagonal - queries.begin;
  return {{keys.begin, end},
          int(std::clamp<int64_t>(first_seer, 0, queries.size()) / lanes),
          int(ceil_div(std::clamp<int64_t>(last_seer + 1, 0, queries.size()), lanes)),
          true};
}

}  // namespace fastattn::cpu
