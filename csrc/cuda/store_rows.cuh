// Outputs on their way from accumulators to global memory.
#pragma once

#include "elements.cuh"
#include "ptx.cuh"
#include "tile_copy.cuh"

namespace fastattn::cuda {

// Rows [row, row + 16·kM) of the tile of queries, through shared memory: as 16-byte pieces, or
// element by element where rows are not aligned. Both halves are this warp's own rows.
template <class T, class Tile, int kM, int kD>
FASTATTN_DEVICE void store_out(const float (&out)[kM][kD][4], const Tile& sO, int row, T* rows,
                               int64_t stride, int count, int cols, bool aligned) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kM; m++) {
#pragma unroll
    for (int d = 0; d < kD; d++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        unsigned char* chunk = sO.chunk(row + 16 * m + 8 * half + lane / 4, d);
        reinterpret_cast<uint32_t*>(chunk)[lane % 4] =
            ptx::pack(out[m][d][2 * half], out[m][d][2 * half + 1], T{});
      }
    }
  }
  __syncwarp();
  constexpr int kLanes = Tile::kGroup;  // of a row
  const auto for_each_chunk = [&](const auto& store) {
    for (int r = row + lane / kLanes; r < row + 16 * kM && r < count; r += 32 / kLanes) {
      for (int c = lane % kLanes; c * kChunk < cols; c += kLanes) {
        store(rows + r * stride + c * kChunk, *reinterpret_cast<const uint4*>(sO.chunk(r, c)), c);
      }
    }
  };
  // A loop each, and a copy of the chunk in the second alone: else the compiler stores words.
  if (aligned) {
    for_each_chunk([](T* to, const uint4& chunk, int) { *reinterpret_cast<uint4*>(to) = chunk; });
  } else {
    for_each_chunk([&](T* to, const uint4& chunk, int c) {
      const uint4 words = chunk;  // read at once: by elements, lanes would meet in banks
      scatter_chunk(to, words, cols - c * kChunk);
    });
  }
}

}  // namespace fastattn::cuda
