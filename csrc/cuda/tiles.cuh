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

// What limits a block of 64 keys on an A100, in cycles of one of its SM's four quarters, by the
// instructions of the loop (cuobjdump) and the rates NVIDIA states; a model, not a measurement:
//
//   D   rows a warp  HMMA.16816 × 8   ex2 × 8   LDSM.x4 of 4 warps × 4   multiply-adds × 2
//   64           32             1024       544                      512                384
//   128          32             2048       544                     1280                512
//   128          16             1024       272                     1088                256
//
// With 16 rows a warp's fragments of K and V are read from shared memory as often for half the
// products, and shared memory is the limit; with 32 it is the tensor cores. A T4's products take
// twice as long, so that 16 rows are enough there, and leave registers for the copies in flight.
// Rich scores are limited by arithmetic and take 16 rows too.
//
// Shared memory is for 163 KB of an A100, 99 KB of sm_86 and sm_89, 64 KB of a T4: 2·D·(block_m +
// 2·block_n) bytes. Registers of plain and rich are ptxas 13.0's for sm_80, and for sm_75.
// clang-format off
constexpr FwdTile kFwdTilesSm80[] = {
    {64, 128, 64, 4, 8, true},    // 32 KB, 240 and 174 registers: 2 blocks an SM; Q fits beside
    {96, 128, 64, 4, 8, false},   // 48 KB, 255 and 175
    {128, 128, 64, 4, 8, false},  // 64 KB, 255 and 232: 128 for O, 64 for S
    {192, 128, 32, 8, 8, false},  // 72 KB, 176 and 216: O alone would be 192 with 32 rows
    {256, 128, 32, 8, 8, false},  // 96 KB, 249 and 244: what sm_86 has
};

constexpr FwdTile kFwdTilesSm75[] = {
    {64, 128, 64, 8, 8, true},    // 32 KB, 170 and 230 registers
    {96, 128, 64, 8, 8, false},   // 48 KB, 180 and 238
    {128, 128, 32, 8, 8, false},  // 48 KB, 189 and 192: with 64 keys, rich scores spill 8 bytes
    {192, 64, 16, 4, 4, false},   // 36 KB, 220 and 228
    {256, 64, 16, 4, 4, false},   // 48 KB, 255 and 255: both spill about 100 bytes
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
