// What the backward kernels are templated on: how a dtype multiplies, and its tile sizes.
#pragma once

#include "elements.cuh"
#include "fragments.cuh"
#include "products.cuh"
#include "products_fp32.cuh"
#include "repair.cuh"
#include "score_mods.cuh"
#include "store_rows.cuh"
#include "tile_copy.cuh"

namespace fastattn::cuda {

// Rows warp_row … of a tile that has `rows`, times `factor`.
template <class T, int kD>
FASTATTN_DEVICE void store_gradient(const float (&grad)[1][kD][4], T* to, int64_t stride,
                                    int warp_row, int rows, int cols, float factor) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = warp_row + lane / 4 + 8 * half;
    if (r >= rows) continue;
#pragma unroll
    for (int d = 0; d < kD; d++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int c = 8 * d + lane % 4 * 2 + e;
        if (c < cols) store_element(to + r * stride + c, grad[0][d][2 * half + e] * factor);
      }
    }
  }
}

// The same for 16-bit elements, 16 bytes at a time if `aligned`, through this warp's rows of a tile
// that nobody needs any more.
template <class T, class Tile, int kD>
FASTATTN_DEVICE void store_gradient(float (&grad)[1][kD][4], const Tile& tile, int warp_row, T* to,
                                    int64_t stride, int rows, int64_t cols, float factor,
                                    bool aligned) {
  for_each_element(grad, [&](float& x, int, int, int, int) { x *= factor; });
  store_out(grad, tile, warp_row, to, stride, rows, static_cast<int>(cols), aligned);
}

// From tiles of 16-bit elements by mma; 16-row fragments, one a warp.
template <class Arch, class Element>
struct TensorCores {
  using T = Element;
  // A T4's products take twice as long, so that shared memory keeps up; its copies need registers.
  static constexpr bool kHolds = Arch::kAsyncCopy;
  template <int kCols>
  using Tile = SharedTile<kCols>;

  template <int kCols>
  FASTATTN_DEVICE static Tile<kCols> tile(unsigned char* bytes) {
    return {bytes};
  }
  template <int kCols>
  static constexpr int row_bytes() {
    return 2 * kCols;
  }
  template <int kRows, int kThreads, int kCols>
  FASTATTN_DEVICE static void copy(const Tile<kCols>& tile, const TileSource<T>& source, int first,
                                   int end) {
    copy_tile<Arch, T, kRows, kCols, kThreads>(source, tile, first, end);
  }
  FASTATTN_DEVICE static void finish_copies() { cuda::finish_copies<Arch>(); }
  // 16 rows of a tile that stays, as operand A: in registers if there is room, or taken from shared
  // memory for every product.
  template <int kCols, bool kHeld>
  struct Operand {
    Tile<kCols> tile;
    int row;
    uint32_t held[kHeld ? kCols / 16 : 1][1][4];

    FASTATTN_DEVICE void hold() {
      if constexpr (kHeld) {
#pragma unroll
        for (int k = 0; k < kCols / 16; k++) load_a(held[k][0], tile, row, k);
      }
    }
  };
  template <int kN, int kCols, bool kHeld>
  FASTATTN_DEVICE static void rows(float (&scores)[1][kN][4], const Operand<kCols, kHeld>& a,
                                   const Tile<kCols>& b) {
    multiply_rows<Arch, T>(scores, a.tile, a.row, a.held, b);
  }
  template <int kN, int kD, int kCols>
  FASTATTN_DEVICE static void add(float (&out)[1][kD][4], const float (&weights)[1][kN][4],
                                  const Tile<kCols>& b) {
    multiply_add<Arch, T>(out, weights, b);
  }
  // Times `factor`, through the rows of an operand that is not needed any more.
  template <int kD, int kCols, bool kHeld>
  FASTATTN_DEVICE static void store(float (&grad)[1][kD][4], const Operand<kCols, kHeld>& own,
                                    T* to, int64_t stride, int rows, int64_t cols, float factor,
                                    bool aligned) {
    if constexpr (!kHeld) __syncwarp();  // other lanes have read them
    store_gradient(grad, own.tile, own.row, to, stride, rows, cols, factor, aligned);
  }
};

// From fp32 tiles by multiply-add.
struct MultiplyAdd {
  using T = float;
  static constexpr bool kHolds = false;
  template <int kCols>
  using Tile = FloatTile<kCols>;

  template <int kCols>
  FASTATTN_DEVICE static Tile<kCols> tile(unsigned char* bytes) {
    return {reinterpret_cast<float*>(bytes)};
  }
  template <int kCols>
  static constexpr int row_bytes() {
    return 4 * FloatTile<kCols>::kStride;
  }
  template <int kRows, int kThreads, int kCols>
  FASTATTN_DEVICE static void copy(const Tile<kCols>& tile, const TileSource<float>& source,
                                   int first, int end) {
    copy_rows<kRows, kCols, kThreads>(tile, source.rows, source.stride, first, end, source.cols);
  }
  FASTATTN_DEVICE static void finish_copies() {}
  template <int kCols, bool kHeld>
  struct Operand {
    Tile<kCols> tile;
    int row;

    FASTATTN_DEVICE void hold() {}
  };
  template <int kN, int kCols, bool kHeld>
  FASTATTN_DEVICE static void rows(float (&scores)[1][kN][4], const Operand<kCols, kHeld>& a,
                                   const Tile<kCols>& b) {
    multiply_rows(scores, a.tile, a.row, b);
  }
  template <int kN, int kD, int kCols>
  FASTATTN_DEVICE static void add(float (&out)[1][kD][4], const float (&weights)[1][kN][4],
                                  const Tile<kCols>& b) {
    multiply_add(out, weights, b);
  }
  template <int kD, int kCols, bool kHeld>
  FASTATTN_DEVICE static void store(const float (&grad)[1][kD][4], const Operand<kCols, kHeld>& own,
                                    T* to, int64_t stride, int rows, int64_t cols, float factor,
                                    bool) {
    store_gradient(grad, to, stride, own.row, rows, static_cast<int>(cols), factor);
  }
};

// What an A100's pipes need for a block that passes by, in cycles of one of an SM's four quarters,
// as tests/pipe_cycles.py counts them; a model, not a measurement:
//
//   kernel  D    rows passing by  products  shared memory, L1
//   dQ      64                32       384                472  600 if Q and dO were not held
//   dQ      128               16       384                472  728
//   dK, dV  64                32       512                664  792 if K and V were not held
//   dK, dV  128               32      1024               1496  1776 for twice 16
//   dQ      256               16       768               1560
//
// Shared memory is the limit: a warp has 16 rows, so that a fragment of what passes by feeds one
// product. A T4's products take twice as long: they are its limit, but for 2 % where D is 256.
//
// kBlockM rows stay, kBlockN pass by; two tiles of each or more, in at most 64 KB.
template <class Math, int kHeadDim>
struct BwdTile {
  static constexpr bool kHalf = sizeof(typename Math::T) == 2;
  static constexpr int kBlockM = kHalf ? (kHeadDim <= 128 ? 64 : 32)
                                       : (kHeadDim <= 64    ? 64
                                          : kHeadDim <= 128 ? 32
                                                            : 16);
  // With 32 at head dim 128 sm_75 would be over 255 registers, as fp32 with 64, and dQ's two stages
  // would leave sm_86 one block of threads.
  static constexpr int kBlockN = kHalf || kHeadDim <= 128 ? (kHalf && kHeadDim <= 64 ? 32 : 16) : 8;
  // dK and dV have one: with twice as many rows, what stays is read half as often.
  static constexpr int kBlockQ = Math::kHolds && kHeadDim == 128 ? 32 : kBlockN;
  static constexpr int kThreads = 2 * kBlockM;  // a warp for 16 rows
  static constexpr int kRowBytes = Math::template row_bytes<kHeadDim>();
  // Of K and V for dQ: 2 where one is copied while the other is computed with.
  static constexpr int kKeyStages = Math::kHolds && kHeadDim <= 128 ? 2 : 1;
  static constexpr int kDQBytes = 2 * (kBlockM + kKeyStages * kBlockN) * kRowBytes;
  static constexpr int kDKVBytes = 2 * (kBlockM + kBlockQ) * kRowBytes + 2 * 4 * kBlockQ;
  static_assert(greater(kDQBytes, kDKVBytes) <= 64 << 10);  // for all architectures
};

}  // namespace fastattn::cuda
