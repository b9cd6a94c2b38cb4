// The online softmax of the rows a warp owns (Dao et al., "FlashAttention", 2022), on accumulator
// fragments.
//
// A thread holds rows group and group + 8 of kTiles 16-row tiles, with the 4 threads of its quad.
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

// How a weight is made of a score. kFused: 2^(score · factor − row_max), one multiply-add and one
// ex2; row_max is in powers of two and rounded, an error of 2^-24 of the score, well below that of
// a 16-bit product. kExact, for fp32: 2^((score − row_max) · factor).
enum class Exponent { kFused, kExact };

template <int kTiles, Exponent kExponent = Exponent::kFused>
class OnlineSoftmax {
 public:
  // `factor` turns scores into powers of two.
  // No key seen yet. The maximum stays finite, so that −inf − row_max is −inf and never NaN.
  FASTATTN_DEVICE explicit OnlineSoftmax(float factor)
      : to_row_max_(kExponent == Exponent::kFused ? factor : 1.0f),
        to_power_(kExponent == Exponent::kFused ? 1.0f : factor) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
      row_max_[m][0] = row_max_[m][1] = -FLT_MAX;
      row_sum_[m][0] = row_sum_[m][1] = 0.0f;
    }
  }

  // Scores become weights, and what was summed before is scaled to the new maximum. fmaxf passes
  // over NaN, which the sum then carries.
  template <int kN, int kD>
  FASTATTN_DEVICE void update(float (&scores)[kTiles][kN][4], float (&out)[kTiles][kD][4]) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) scale_row(out[m], half, weigh_row(scores, m, half));
    }
  }

  // The same in two steps: what was summed before is scaled later, by `rescale`.
  template <int kN>
  FASTATTN_DEVICE void weigh(float (&scores)[kTiles][kN][4], float (&rescale)[kTiles][2]) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) rescale[m][half] = weigh_row(scores, m, half);
    }
  }
  template <int kD>
  FASTATTN_DEVICE static void scale(float (&out)[kTiles][kD][4],
                                    const float (&rescale)[kTiles][2]) {
#pragma unroll
    for (int m = 0; m < kTiles; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) scale_row(out[m], half, rescale[m][half]);
    }
  }

  // What a row's output is to be multiplied by, and its lse. A sink is one more logit, in natural
  // units and without a value; −inf = none.
  struct Finished {
    float factor, lse;
  };
  FASTATTN_DEVICE Finished finish(int m, int half, float sink) const {
    constexpr float kUnit = kExponent == Exponent::kFused ? kLn2 : 1.0f;  // of row_max
    constexpr float kPerNatural = kExponent == Exponent::kFused ? kLog2E : 1.0f;
    const float sum = quad_sum(row_sum_[m][half]);
    const float before = row_max_[m][half], logit = sink * kPerNatural;
    const float now = fmaxf(before, logit);
    const float rescale = ptx::ex2((before - now) * to_power_);
    const float total = sum * rescale + ptx::ex2((logit - now) * to_power_);
    if (total == 0.0f) return {0.0f, -INFINITY};  // no key was seen
    return {rescale / total, now * kUnit + logf(total)};
  }

 private:
  template <int kN>
  FASTATTN_DEVICE float weigh_row(float (&scores)[kTiles][kN][4], int m, int half) {
    float block_max = -INFINITY;
#pragma unroll
    for (int n = 0; n < kN; n++) {
      block_max = fmaxf(block_max, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
    }
    const float before = row_max_[m][half];
    const float now = fmaxf(before, quad_max(block_max) * to_row_max_);
    const float rescale = ptx::ex2((before - now) * to_power_);
    row_max_[m][half] = now;
    float sum = row_sum_[m][half] * rescale;
#pragma unroll
    for (int n = 0; n < kN; n++) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; e++) {
        const float weight = ptx::ex2((scores[m][n][e] * to_row_max_ - now) * to_power_);
        scores[m][n][e] = weight;
        sum += weight;
      }
    }
    row_sum_[m][half] = sum;
    return rescale;
  }
  template <int kD>
  FASTATTN_DEVICE static void scale_row(float (&out)[kD][4], int half, float rescale) {
#pragma unroll
    for (int d = 0; d < kD; d++) {
      out[d][2 * half] *= rescale;
      out[d][2 * half + 1] *= rescale;
    }
  }

  float row_max_[kTiles][2];
  float row_sum_[kTiles][2];  // over this thread's columns, until finish()
  const float to_row_max_, to_power_;
};

}  // namespace fastattn::cuda
