// A tile in shared memory as TMA writes it and wgmma reads it, for rungs 6 and 7.
//
// Columns lie in panels of 64: a row of a panel is 128 bytes, whose eight 16-byte chunks are
// swizzled as in rung 5: chunk c of row r lies at c ^ (r % 8).
#pragma once

#include "ladder.h"
#include "ptx_sm90.cuh"
#include "tensor_map.cu"  // tensor_map(): asks the driver for a CUtensorMap

namespace ladder {

template <int kRows, int kHeadDim>
struct Tile {
  static constexpr int kPanelBytes = kRows * 128, kBytes = kHeadDim / 64 * kPanelBytes;
  unsigned char* bytes;  // aligned to 1024

  // By one thread: rows first … of a head, zeros behind the last.
  FASTATTN_DEVICE void load(const CUtensorMap& map, uint64_t* barrier, int first, int head) const {
    for (int i = 0; i < kHeadDim / 64; i++) {
      ptx::tma_load(bytes + i * kPanelBytes, &map, barrier, 64 * i, first, head, 0);
    }
  }

  // Step k, 16 deep, of a product whose k are columns of the tile: from row `first` on, they are
  // rows of A or columns of B.
  FASTATTN_DEVICE uint64_t rows(int first, int k) const {
    return descriptor(first * 128 + k / 4 * kPanelBytes + k % 4 * 32, 0);
  }
  // Step k of a product whose k are rows of the tile: its columns are columns of B.
  FASTATTN_DEVICE uint64_t columns(int k) const { return descriptor(16 * k * 128, kPanelBytes); }

 private:
  // In units of 16 bytes: where it begins; how far the next panel is, where columns are not k; that
  // 8 rows further on is 1024 bytes further on. 1 << 62: a swizzle of 128 bytes.
  FASTATTN_DEVICE uint64_t descriptor(int offset, int panel) const {
    return uint64_t{(ptx::shared_address(bytes) + offset) >> 4} | uint64_t(panel >> 4) << 16 |
           uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
  }
};

// Of a (heads, seqlen, head_dim) tensor, to copy boxes of `rows` rows and 64 columns.
template <class T>
CUtensorMap map_of(const Attention<T>& a, const T* data, int head_dim, int rows) {
  const int64_t head = int64_t{a.seqlen} * head_dim;
  return tensor_map({fastattn::DType::kBF16,
                     data,
                     1,
                     a.seqlen,
                     a.heads,
                     head_dim,
                     {a.heads * head, head_dim, head},
                     rows});
}

}  // namespace ladder
