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
  // Else taken from shared memory again for every block of keys.
  bool q_in_registers, q_in_registers_rich;

  FASTATTN_HD constexpr int threads() const { return 32 * warps; }
  FASTATTN_HD constexpr int m_tiles() const { return block_m / (16 * warps); }  // a warp
  FASTATTN_HD constexpr int shared_bytes() const { return 2 * head_dim * (block_m + 2 * block_n); }
};

// What an A100's pipes need for a block of keys, in cycles of one of its SM's four quarters, as
// tests/pipe_cycles.py counts them; a model, not a measurement:
//
//   D    rows a warp  keys  products  shared memory, L1  exponentials  multiply-adds
//   64            32    64      1024                696           544            472
//   128           32    64      2048               1592           544            662
//   128           16    64      1024               1320           272            422
//   192           16    32       768                904           144            330  Q held
//   192           16    32       768               1096           144            342  not held
//   256           16    32      1024               1448           144            392
//
// With 16 rows a warp's fragments of K and V are read from shared memory as often for half the
// products, and shared memory is the limit; with 32 it is the tensor cores. A T4's products take
// twice as long, so that 16 rows are enough there, and leave registers for the copies in flight.
// Rich scores take 16 rows too: with 32 they would spill.
//
// Shared memory is for 163 KB of an A100, 99 KB of sm_86 and sm_89, 64 KB of a T4: 2·D·(block_m +
// 2·block_n) bytes. Registers of plain and rich are ptxas 13.0's for sm_80, and for sm_75.
// clang-format off
constexpr FwdTile kFwdTilesSm80[] = {
    {64, 128, 64, 4, 8, true, true},     // 32 KB, 233 and 207 registers: 2 blocks an SM of plain
    {96, 128, 64, 4, 8, false, true},    // 48 KB, 243 and 232
    {128, 128, 64, 4, 8, false, false},  // 64 KB, 255 and 226: 128 for O, 64 for S
    {192, 128, 32, 8, 8, true, false},   // 72 KB, 247 and 210: O alone would be 192 with 32 rows
    {256, 128, 32, 8, 8, false, false},  // 96 KB, 242 and 242: what sm_86 has
};

constexpr FwdTile kFwdTilesSm75[] = {
    {64, 128, 64, 8, 8, true, true},     // 32 KB, 164 and 236 registers
    {96, 128, 64, 8, 8, false, false},   // 48 KB, 182 and 232
    {128, 128, 32, 8, 8, false, false},  // 48 KB, 167 and 192: with 64 keys, rich would spill
    {192, 64, 16, 4, 4, false, false},   // 36 KB, 220 and 222
    {256, 64, 16, 4, 4, false, false},   // 48 KB, 255 and 255: they spill 120 and 128 bytes
};
// clang-format on

template <class Arch>
FASTATTN_HD constexpr FwdTile fwd_tile(int head_dim, Scores scores) {
  for (int i = 0; i < 5; i++) {
    FwdTile tile = Arch::kAsyncCopy ? kFwdTilesSm80[i] : kFwdTilesSm75[i];
    if (tile.head_dim != head_dim) continue;
    if (scores == Scores::kRich) {
      tile.warps = tile.warps_rich;
      tile.q_in_registers = tile.q_in_registers_rich;
    }
    return tile;
  }
  return {};
}

}  // namespace fastattn::cuda
