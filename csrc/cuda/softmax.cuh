// The online softmax of the rows a warp owns (Dao et al., "FlashAttention", 2022), on accumulator
// fragments.
//
// A thread holds rows group and group + 8 of kTiles 16-row tiles, with the 4 threads of its quad.
// Scores come as they are; `factor` turns them into powers of two, so that each weight costs one
// multiply-add and one ex2: weight = 2^(score · factor − row_max).
#pragma once

#include <cfloat>

#include "elements.cuh"
#include "ptx.cuh"

namespace fastattn::cuda {

constexpr float kLog2E = 1.44269504088896341f;  // log2(e)
constexpr float kLn2 = 0.693147180559945309f;

FASTATTN_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FASTATTN_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <int kTiles>
struct OnlineSoftmax {
  float row_max[kTiles][2];  // in powers of two
  float row_sum[kTiles][2];  // over this thread's columns, until finish()

  // No key seen yet. The maximum stays finite, so that −inf − row_max is −inf and never NaN.
  FASTATTN_DEVICE OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      row_max[m][0] = row_max[m][1] = -FLT_MAX;
      row_sum[m][0] = row_sum[m][1] = 0.0f;
    }
  }

  // Scores become weights, and what was summed before is scaled to the new maximum. fmaxf passes
  // over NaN, which the sum then carries.
  template <int kN, int kD>
  FASTATTN_DEVICE void update(float (&scores)[kTiles][kN][4], float factor,
                              float (&out)[kTiles][kD][4]) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float block_max = -INFINITY;
#pragma unroll
        for (int n = 0; n < kN; n++) {
          block_max = fmaxf(block_max, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        const float before = row_max[m][half];
        const float now = fmaxf(before, quad_max(block_max) * factor);
        const float rescale = ptx::ex2(before - now);
        row_max[m][half] = now;
        float sum = row_sum[m][half] * rescale;
#pragma unroll
        for (int n = 0; n < kN; n++) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; e++) {
            const float weight = ptx::ex2(scores[m][n][e] * factor - now);
            scores[m][n][e] = weight;
            sum += weight;
          }
        }
        row_sum[m][half] = sum;
#pragma unroll
        for (int d = 0; d < kD; d++) {
          out[m][d][2 * half] *= rescale;
          out[m][d][2 * half + 1] *= rescale;
        }
      }
    }
  }

  // What a row's output is to be multiplied by, and its lse. A sink is one more logit, without a
  // value; −inf = none.
  struct Finished {
    float factor, lse;
  };
  FASTATTN_DEVICE Finished finish(int m, int half, float sink) const {
    const float sum = quad_sum(row_sum[m][half]);
    const float before = row_max[m][half], logit = sink * kLog2E;
    const float now = fmaxf(before, logit);
    const float rescale = ptx::ex2(before - now);
    const float total = sum * rescale + ptx::ex2(logit - now);
    if (total == 0.0f) return {0.0f, -INFINITY};  // no key was seen
    return {rescale / total, (now + ptx::lg2(total)) * kLn2};
  }
};

}  // namespace fastattn::cuda
