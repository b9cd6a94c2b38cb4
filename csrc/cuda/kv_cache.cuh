// Where the keys and values of a sequence lie in a cache of rows or of pages.
#pragma once

#include "elements.cuh"

namespace fastattn::cuda {

// n / divisor for 0 ≤ n < 2³¹ by a multiplication: a GPU divides in some twenty instructions.
struct Divider {
  uint32_t multiplier = 0;  // ⌈2^(32 + shift) / divisor⌉ − 2³²
  int shift = 0;            // ⌈log2 divisor⌉

  static Divider by(int64_t divisor) {
    Divider d;
    if (divisor <= 1) return d;
    while ((int64_t(1) << d.shift) < divisor) d.shift++;
    const uint64_t excess = (uint64_t(1) << d.shift) - uint64_t(divisor);
    d.multiplier = uint32_t((excess << 32) / uint64_t(divisor) + 1);
    return d;
  }
  FASTATTN_DEVICE int divide(int n) const {
    const uint64_t high = (uint64_t(uint32_t(n)) * multiplier) >> 32;
    return int((high + uint32_t(n)) >> shift);
  }
};

// Position j of a sequence is row `row`, position j of the cache, or, with a page table, position
// j % page_size of page pages[j / page_size]; pages then are what a Strides' `batch` steps over.
struct CachePlace {
  int64_t row;
  const int32_t* pages;  // null = not paged
  int page_size;
  Divider by_page_size;

  template <class Params>  // AttnDecodeParams or CacheAppendParams
  FASTATTN_DEVICE CachePlace(const Params& p, int64_t b, Divider by_page_size)
      : row(p.cache_batch_idx ? p.cache_batch_idx[b] : b),
        pages(p.block_table ? p.block_table + b * p.block_table_stride : nullptr),
        page_size(int(p.page_size)),
        by_page_size(by_page_size) {}

  struct Position {
    int64_t batch;  // row or page
    int seq;        // in it
  };
  FASTATTN_DEVICE Position find(int j) const {
    if (pages == nullptr) return {row, j};
    const int page = by_page_size.divide(j);
    return {pages[page], j - page * page_size};
  }
};

// Element offset of head 0.
FASTATTN_DEVICE int64_t offset_of(const CachePlace::Position& at, const Strides& stride) {
  return at.batch * stride.batch + at.seq * stride.seq;
}

}  // namespace fastattn::cuda
