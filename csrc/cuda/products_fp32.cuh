// The products of products.cuh in fp32, by multiply-add: tensor cores would round inputs to 10 bits
// (tf32).
//
// A thread multiplies what its fragment stands for: rows group and group + 8, columns 2t and 2t + 1
// of every 8. For A · Bᵀ, 4 elements of its rows of A and of B at a time; for weights · B, a weight
// comes from the lane of the quad that has it.
#pragma once

#include "elements.cuh"
#include "fragments.cuh"
#include "score_mods.cuh"

namespace fastattn::cuda {

// Rows in shared memory are 16 bytes longer than they have elements, so that 8 rows' 16-byte pieces
// lie in 8 different groups of banks.
template <int kCols>
struct FloatTile {
  static constexpr int kStride = kCols + 4;
  float* at;

  FASTATTN_DEVICE float* row(int r) const { return at + r * kStride; }
};

// Rows [first, first + kRows), of which those below `end` are there; zeros elsewhere.
template <int kRows, int kCols, int kThreads, class T>
FASTATTN_DEVICE void copy_rows(const FloatTile<kCols>& tile, const T* rows, int64_t stride,
                               int first, int end, int cols) {
#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * kCols; i += kThreads) {
    const int r = i / kCols, c = i % kCols;
    const bool there = first + r < end && c < cols;
    tile.row(r)[c] = there ? to_float(rows[(first + r) * stride + c]) : 0.0f;
  }
}

FASTATTN_DEVICE float dot(const float4& a, const float4& b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// scores = A (rows row … of sA) · Bᵀ. Sums of kPart products are made apart and added up then, as
// matrix products in blocks have it: one long sum would round more.
template <int kN, int kHeadDim>
FASTATTN_DEVICE void multiply_rows(float (&scores)[1][kN][4], const FloatTile<kHeadDim>& sA,
                                   int row, const FloatTile<kHeadDim>& sB) {
  constexpr int kPart = 32;
  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  clear(scores);
#pragma unroll 1
  for (int first = 0; first < kHeadDim; first += kPart) {
    float part[kN][4] = {};
#pragma unroll 2
    for (int d = first; d < first + kPart; d += 4) {
      float4 a[2], b;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        a[half] = *reinterpret_cast<const float4*>(sA.row(row + group + 8 * half) + d);
      }
#pragma unroll
      for (int n = 0; n < kN; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          b = *reinterpret_cast<const float4*>(sB.row(8 * n + 2 * t + e) + d);
          part[n][e] = dot(a[0], b, part[n][e]);
          part[n][2 + e] = dot(a[1], b, part[n][2 + e]);
        }
      }
    }
    for_each_element(
        scores, [&](float& score, int, int n, int half, int e) { score += part[n][2 * half + e]; });
  }
}

// out += weights · B
template <int kN, int kD, int kHeadDim>
FASTATTN_DEVICE void multiply_add(float (&out)[1][kD][4], const float (&weights)[1][kN][4],
                                  const FloatTile<kHeadDim>& sB) {
  const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kN; n++) {
#pragma unroll
    for (int key = 0; key < 8; key++) {
      const int owner = (lane & ~3) | key / 2, e = key % 2;
      const float p0 = __shfl_sync(0xffffffffu, weights[0][n][e], owner);
      const float p1 = __shfl_sync(0xffffffffu, weights[0][n][2 + e], owner);
      const float* v = sB.row(8 * n + key) + 2 * t;
#pragma unroll
      for (int d = 0; d < kD; d++) {
        const float2 values = *reinterpret_cast<const float2*>(v + 8 * d);
        out[0][d][0] = fmaf(p0, values.x, out[0][d][0]);
        out[0][d][1] = fmaf(p0, values.y, out[0][d][1]);
        out[0][d][2] = fmaf(p1, values.x, out[0][d][2]);
        out[0][d][3] = fmaf(p1, values.y, out[0][d][3]);
      }
    }
  }
}

}  // namespace fastattn::cuda
