// Tiles in shared memory as sm_90 copies and multiplies them.
//
// Columns lie in panels of 64: a row of a panel is 128 bytes, which TMA swizzles within groups of 8
// rows, and wgmma reads through a descriptor of the first element and two strides.
#pragma once

#include "../block_range.h"
#include "ptx_sm90.cuh"

namespace fastattn::cuda {

template <int kRowCount, int kCols>
struct PanelTile {
  static constexpr int kRows = kRowCount;
  static constexpr int kPanelCols = 64, kRowBytes = 128, kGroupBytes = 8 * kRowBytes;
  static constexpr int kSteps = kCols / 16;  // of a product along the columns
  static constexpr int kPanels = ceil_div(kCols, kPanelCols);
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kRows % 8 == 0);
  static constexpr int kGroup = 8;  // 16-byte chunks of a row of a panel
  unsigned char* bytes;             // aligned to kGroupBytes

  // Where chunk c of a row lies, for threads.
  FASTATTN_DEVICE unsigned char* chunk(int row, int c) const {
    return bytes + c / kGroup * kPanelBytes + row * kRowBytes + ((c % kGroup ^ row % 8) << 4);
  }

  // As an operand whose rows, or columns of B, are rows row … of this tile, and whose k are columns
  // 16·k ….
  FASTATTN_DEVICE uint64_t rows(int row, int k) const {
    return descriptor(row * kRowBytes + k / 4 * kPanelBytes + k % 4 * 32, 0);
  }
  // As an operand whose columns, or rows of A, are columns of this tile from a panel's first on,
  // and whose k are rows 16·k ….
  FASTATTN_DEVICE uint64_t columns(int k, int panel = 0) const {
    return descriptor(panel * kPanelBytes + 16 * k * kRowBytes, kPanelBytes);
  }

  // Rows first … of one head of a (B, S, H, D) tensor; `map` has boxes of (64, kRows).
  FASTATTN_DEVICE void load(const CUtensorMap& map, uint64_t* barrier, int first, int head,
                            int batch) const {
#pragma unroll
    for (int i = 0; i < kPanels; i++) {
      ptx::tma_load(bytes + i * kPanelBytes, &map, barrier, kPanelCols * i, first, head, batch);
    }
  }

 private:
  // Of what begins `offset` bytes into the tile. `panel_stride` leads from 64 columns to the next,
  // where columns are not k; groups of 8 rows follow each other; 1 << 62 stands for the swizzle.
  // Fields count 16 bytes. Only the lower word depends on anything: an addition for each product.
  FASTATTN_DEVICE uint64_t descriptor(int offset, int panel_stride) const {
    const uint32_t low = (ptx::shared_address(bytes) >> 4) + (offset >> 4) +
                         (static_cast<uint32_t>(panel_stride) >> 4 << 16);
    return low | uint64_t{kGroupBytes >> 4 | 1u << 30} << 32;
  }
};

}  // namespace fastattn::cuda
