// Where the keys and values of a sequence lie in a cache of rows or of pages.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace fastattn::cpu {

// Position j of a sequence is row `row`, position j of the cache, or, with a page table, position
// j % page_size of page pages[j / page_size]; pages then are what a Strides' `batch` steps over.
struct CachePlace {
  int64_t row;
  const int32_t* pages;  // null = not paged
  int64_t page_size;

  template <class Params>  // AttnDecodeParams or CacheAppendParams
  CachePlace(const Params& p, int64_t b)
      : row(p.cache_batch_idx ? p.cache_batch_idx[b] : b),
        pages(p.block_table ? p.block_table + b * p.block_table_stride : nullptr),
        page_size(p.page_size) {}

  // Element offset of head 0 of position j.
  int64_t offset(int64_t j, const Strides& stride) const {
    if (pages == nullptr) return row * stride.batch + j * stride.seq;
    return pages[j / page_size] * stride.batch + j % page_size * stride.seq;
  }

  // How many positions of [begin, end) lie `seq` apart, from the first one on.
  int64_t run_length(int64_t begin, int64_t end) const {
    return pages == nullptr ? end - begin : std::min(end - begin, page_size - begin % page_size);
  }
};

}  // namespace fastattn::cpu
