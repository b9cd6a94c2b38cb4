// Tile sizes, each with its reason.
#pragma once

#include "../block_range.h"
#include "fragments.cuh"

namespace fastattn::cuda {

// kPlain: scale · q · k with scale > 0, and window edges. kRich: everything, by run-time values.
enum class Scores { kPlain, kRich };

// Attention's forward: block_m queries a block of threads, block_n keys at a time.
struct FwdTile {
  int head_dim, block_m, block_n, warps, warps_rich;
  bool q_in_registers;  // else taken from shared memory again for every block of keys

  FASTATTN_HD constexpr int threads() const { return 32 * warps; }
  FASTATTN_HD constexpr int m_tiles() const { return block_m / (16 * warps); }  // a warp
  FASTATTN_HD constexpr int shared_bytes() const { return 2 * head_dim * (block_m + 2 * block_n); }
};

// clang-format off
constexpr FwdTile kFwdTilesSm80[] = {
    {64, 128, 64, 4, 8, true},
    {96, 128, 64, 4, 8, false},
    {128, 128, 64, 4, 8, false},
    {192, 128, 32, 8, 8, false},
    {256, 128, 32, 8, 8, false},
};

constexpr FwdTile kFwdTilesSm75[] = {
    {64, 128, 64, 8, 8, true},
    {96, 128, 64, 8, 8, false},
    {128, 128, 64, 8, 8, false},
    {192, 64, 16, 4, 4, false},
    {256, 64, 16, 4, 4, false},
};
// clang-format on

template <class Arch>
FASTATTN_HD constexpr FwdTile fwd_tile(int head_dim, Scores scores) {
  for (int i = 0; i < 5; i++) {
    FwdTile tile = Arch::kAsyncCopy ? kFwdTilesSm80[i] : kFwdTilesSm75[i];
    if (tile.head_dim != head_dim) continue;
    if (scores == Scores::kRich) tile.warps = tile.warps_rich;
    return tile;
  }
  return {};
}

}  // namespace fastattn::cuda
