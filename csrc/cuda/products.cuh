// The two products of attention, by a warp, on 16-row fragments: by tensor cores from tiles of
// 16-bit elements, or by multiply-add from fp32.
//
//   multiply_rows  scores (16·kM, 8·kN) = A · Bᵀ, both by rows, as Q · Kᵀ
//   multiply_add   out (16·kM, 8·kD) += weights · B, as P · V
#pragma once

#include "elements.cuh"
#include "fragments.cuh"
#include "ptx.cuh"
#include "tile_copy.cuh"

namespace fastattn::cuda {

// scores = A (rows row … of sA, or the fragments a_held) · Bᵀ
template <class Arch, class T, int kM, int kN, int kHeadDim, int kHeld>
FASTATTN_DEVICE void multiply_rows(float (&scores)[kM][kN][4], const SharedTile<kHeadDim>& sA,
                                   int row, const uint32_t (&a_held)[kHeld][kM][4],
                                   const SharedTile<kHeadDim>& sB) {
  clear(scores);
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; k++) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; m++) {
      if constexpr (kHeld > 1) {
#pragma unroll
        for (int e = 0; e < 4; e++) a[m][e] = a_held[k][m][e];
      } else {
        load_a(a[m], sA, row + 16 * m, k);
      }
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      load_b(b, sB, 8 * n, k);
#pragma unroll
      for (int m = 0; m < kM; m++) {
        mma(Arch{}, T{}, scores[m][n], a[m], b[0], b[1]);
        mma(Arch{}, T{}, scores[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// out += weights · B
template <class Arch, class T, int kM, int kN, int kD, int kHeadDim>
FASTATTN_DEVICE void multiply_add(float (&out)[kM][kD][4], const float (&weights)[kM][kN][4],
                                  const SharedTile<kHeadDim>& sB) {
#pragma unroll
  for (int k = 0; k < kN / 2; k++) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; m++) pack_a(a[m], weights[m], k, T{});
#pragma unroll
    for (int d = 0; d < kD; d += 2) {
      uint32_t b[4];
      load_b_trans(b, sB, k, 8 * d);
#pragma unroll
      for (int m = 0; m < kM; m++) {
        mma(Arch{}, T{}, out[m][d], a[m], b[0], b[1]);
        mma(Arch{}, T{}, out[m][d + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace fastattn::cuda
