// What a warp multiplies with: the architectures below sm_90, tiles of 16-bit elements in shared
// memory, and fragments taken from them.
//
// Shapes are (rows, columns) of a tile; lane = 4·group + t as in ptx.cuh.
#pragma once

#include "elements.cuh"
#include "ptx.cuh"

namespace fastattn::cuda {

// fp16 alone, products 8 deep, and copies to shared memory pass through registers.
struct Sm75 {
  static constexpr bool kAsyncCopy = false;
  static constexpr int kMostShared = 64 << 10;  // bytes a block of threads may have
};
// fp16 and bf16, products 16 deep, and copies that need no registers.
struct Sm80 {
  static constexpr bool kAsyncCopy = true;
  static constexpr int kMostShared = 99 << 10;  // of sm_86, sm_89 and sm_120, which have least
};

// d (16, 8) += a (16, 16) · b (16, 8)
template <class T>
FASTATTN_DEVICE void mma(Sm80, T type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                         uint32_t b1) {
  ptx::mma_m16n8k16(d, a, b0, b1, type);
}
FASTATTN_DEVICE void mma(Sm75, fp16 type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                         uint32_t b1) {
  ptx::mma_m16n8k8(d, a[0], a[1], b0, type);
  ptx::mma_m16n8k8(d, a[2], a[3], b1, type);
}

constexpr int kChunk = 8;  // elements in 16 bytes: what ldmatrix and copies move at a time

// A row-major tile in shared memory, kCols a multiple of 32. Chunks of a row are permuted by the
// row's number within groups of kGroup, so that 8 rows of one column of chunks, which is what
// ldmatrix reads, lie in 8 different groups of banks: rows of 64·n columns all begin at bank 0 and
// need 8 permutations; rows of 96 begin at banks 0 and 16 in turn, and 4 are enough.
template <int kCols>
struct SharedTile {
  static_assert(kCols % 32 == 0);
  static constexpr int kRowBytes = 2 * kCols;
  static constexpr int kGroup = kCols % 64 == 0 ? 8 : 4;
  unsigned char* bytes;

  // 8 rows, or kGroup chunks, further on lies the same number of bytes further on: loops add
  // constants to one address.
  FASTATTN_DEVICE unsigned char* chunk(int row, int chunk) const {
    const int permutation = kGroup == 8 ? row & 7 : row >> 1 & 3;
    return bytes + row * kRowBytes + chunk / kGroup * (16 * kGroup) +
           ((chunk % kGroup ^ permutation) << 4);
  }
};

// The 16 × 16 fragment at (row, column 16·k) as operand A.
template <int kCols>
FASTATTN_DEVICE void load_a(uint32_t (&a)[4], const SharedTile<kCols>& tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, tile.chunk(row + lane % 16, 2 * k + lane / 16));
}

// Rows [row, row + 16), columns [16·k, 16·k + 16) of a tile whose rows are columns of B: b[0], b[1]
// multiply into result columns row … row + 7, b[2] and b[3] into the next 8.
template <int kCols>
FASTATTN_DEVICE void load_b(uint32_t (&b)[4], const SharedTile<kCols>& tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(b, tile.chunk(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2) +
                          row * SharedTile<kCols>::kRowBytes);
}

// Rows [16·k, 16·k + 16), columns [column, column + 16) of a tile whose rows are rows of B: b[0],
// b[1] for the first 8 columns, b[2] and b[3] for the next.
template <int kCols>
FASTATTN_DEVICE void load_b_trans(uint32_t (&b)[4], const SharedTile<kCols>& tile, int k,
                                  int column) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4_trans(b, tile.chunk(lane % 16, column / kChunk + lane / 16) +
                                16 * k * SharedTile<kCols>::kRowBytes);
}

// Columns [16·k, 16·k + 16) of accumulators (16, 8·n), rounded to T, as operand A: a thread's own
// elements, with nothing to exchange.
template <class T, int kN>
FASTATTN_DEVICE void pack_a(uint32_t (&a)[4], const float (&c)[kN][4], int k, T type) {
  a[0] = ptx::pack(c[2 * k][0], c[2 * k][1], type);
  a[1] = ptx::pack(c[2 * k][2], c[2 * k][3], type);
  a[2] = ptx::pack(c[2 * k + 1][0], c[2 * k + 1][1], type);
  a[3] = ptx::pack(c[2 * k + 1][2], c[2 * k + 1][3], type);
}

template <int kM, int kN>
FASTATTN_DEVICE void clear(float (&c)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; m++) {
#pragma unroll
    for (int n = 0; n < kN; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) c[m][n][e] = 0.0f;
    }
  }
}

}  // namespace fastattn::cuda
