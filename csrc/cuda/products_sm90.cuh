// Products of a warpgroup on tiles in shared memory: issued as one group, not waited for. Each
// result has 64 rows; fragments are those of fragments.cuh, 16 rows a warp.
#pragma once

#include "fragments.cuh"
#include "panel_tile.cuh"

namespace fastattn::cuda {

using ptx::Major;

// scores = rows [row, row + 64) of A · Bᵀ, as Q · Kᵀ
template <class T, int kN, class ATile, class BTile>
FASTATTN_DEVICE void issue_rows(float (&scores)[1][kN][4], const ATile& sA, int row,
                                const BTile& sB) {
#pragma unroll
  for (int k = 0; k < BTile::kSteps; k++) {
    ptx::wgmma<Major::kK, Major::kK>(scores[0], sA.rows(row, k), sB.rows(0, k), k > 0, T{});
  }
  ptx::wgmma_commit();
}

// out += weights · B, as P · V
template <class T, int kK, int kD, class BTile>
FASTATTN_DEVICE void issue_add(float (&out)[1][kD][4], const uint32_t (&weights)[kK][4],
                               const BTile& sB) {
#pragma unroll
  for (int k = 0; k < kK; k++) {
    ptx::wgmma<Major::kMN>(out[0], weights[k], sB.columns(k), true, T{});
  }
  ptx::wgmma_commit();
}

// out = Aᵀ · B of 64 columns each, of these panels of tiles with as many rows, as dS · K from dSᵀ
template <class T, class ATile, class BTile>
FASTATTN_DEVICE void issue_columns(float (&out)[1][8][4], const ATile& sA, int panel_a,
                                   const BTile& sB, int panel_b) {
  static_assert(ATile::kRows == BTile::kRows);
#pragma unroll
  for (int k = 0; k < ATile::kRows / 16; k++) {
    ptx::wgmma<Major::kMN, Major::kMN>(out[0], sA.columns(k, panel_a), sB.columns(k, panel_b),
                                       k > 0, T{});
  }
  ptx::wgmma_commit();
}

// Weights rounded to T, as the operand of issue_add.
template <class T, int kK, int kN>
FASTATTN_DEVICE void pack_weights(uint32_t (&packed)[kK][4], const float (&weights)[1][kN][4]) {
  static_assert(kN == 2 * kK);
#pragma unroll
  for (int k = 0; k < kK; k++) pack_a(packed[k], weights[0], k, T{});
}

}  // namespace fastattn::cuda
