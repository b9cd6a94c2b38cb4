// What the backward kernels are templated on: how a dtype multiplies, and its tile sizes.
#pragma once

#include "elements.cuh"
#include "fragments.cuh"
#include "products.cuh"
#include "products_fp32.cuh"
#include "tile_copy.cuh"

namespace fastattn::cuda {

// From tiles of 16-bit elements by mma; 16-row fragments, one a warp.
template <class Arch, class Element>
struct TensorCores {
  using T = Element;
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
  template <int kN, int kCols>
  FASTATTN_DEVICE static void rows(float (&scores)[1][kN][4], const Tile<kCols>& a, int row,
                                   const Tile<kCols>& b) {
    const uint32_t none[1][1][4] = {};
    multiply_rows<Arch, T>(scores, a, row, none, b);
  }
  template <int kN, int kD, int kCols>
  FASTATTN_DEVICE static void add(float (&out)[1][kD][4], const float (&weights)[1][kN][4],
                                  const Tile<kCols>& b) {
    multiply_add<Arch, T>(out, weights, b);
  }
};

// From fp32 tiles by multiply-add.
struct MultiplyAdd {
  using T = float;
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
  template <int kN, int kCols>
  FASTATTN_DEVICE static void rows(float (&scores)[1][kN][4], const Tile<kCols>& a, int row,
                                   const Tile<kCols>& b) {
    multiply_rows(scores, a, row, b);
  }
  template <int kN, int kD, int kCols>
  FASTATTN_DEVICE static void add(float (&out)[1][kD][4], const float (&weights)[1][kN][4],
                                  const Tile<kCols>& b) {
    multiply_add(out, weights, b);
  }
};

// kBlockM rows stay, kBlockN pass by; two tiles of each, in at most 64 KB.
template <class Math, int kHeadDim>
struct BwdTile {
  static constexpr bool kHalf = sizeof(typename Math::T) == 2;
  static constexpr int kBlockM = kHalf ? (kHeadDim <= 128 ? 64 : 32)
                                       : (kHeadDim <= 64    ? 64
                                          : kHeadDim <= 128 ? 32
                                                            : 16);
  // dK and dV of 128 with scores of 32 would be over 255 registers; likewise in fp32 with 64.
  static constexpr int kBlockN = kHalf || kHeadDim <= 128 ? (kHalf && kHeadDim <= 64 ? 32 : 16) : 8;
  static constexpr int kThreads = 2 * kBlockM;  // a warp for 16 rows
  static constexpr int kRowBytes = Math::template row_bytes<kHeadDim>();
  static constexpr int kSharedBytes = 2 * (kBlockM + kBlockN) * kRowBytes;
};

}  // namespace fastattn::cuda
