// How the CPU kernels cut a block of keys so that most of it needs no masking.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../block_range.h"

namespace fastattn::cpu {

constexpr int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }

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
