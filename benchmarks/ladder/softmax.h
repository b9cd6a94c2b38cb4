// The online softmax on accumulators of rungs 5 to 7, where a warp owns 16 rows, and the outputs'
// way to memory. With lane = 4·group + t, a thread has columns 8·n + 2t and 8·n + 2t + 1 of rows
// group (elements 0 and 1 of accumulator n) and group + 8 (elements 2 and 3).
#pragma once

#include "ladder.h"

namespace ladder {

constexpr float kLog2E = 1.44269504088896341f;

struct Softmax {
  float factor;  // from scores to powers of two
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};  // of this thread's columns

  FASTATTN_DEVICE explicit Softmax(float scale) : factor(scale * kLog2E) {}

  // Keys from `left` on are not there.
  template <int kN>
  FASTATTN_DEVICE static void hide(float (&scores)[kN][4], int left) {
    left -= 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kN; n++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (8 * n + e % 2 >= left) scores[n][e] = -INFINITY;
      }
    }
  }

  // Scores become weights in bf16, as operand A of the next product: a thread's own elements, with
  // nothing to exchange. What was summed before is scaled to the new maximum.
  template <int kN, int kD>
  FASTATTN_DEVICE void weigh(const float (&scores)[kN][4], uint32_t (&weights)[kN / 2][4],
                             float (&out)[kD][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {  // rows group and group + 8
      float block_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < kN; n++) {
        block_max = fmaxf(block_max, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      }
      const float new_max = fmaxf(row_max[half], quad_max(block_max) * factor);
      const float rescale = ptx::ex2(row_max[half] - new_max);
      row_max[half] = new_max;
      row_sum[half] *= rescale;
#pragma unroll
      for (int n = 0; n < kN; n++) {
        const float low = ptx::ex2(scores[n][2 * half] * factor - new_max);
        const float high = ptx::ex2(scores[n][2 * half + 1] * factor - new_max);
        row_sum[half] += low + high;
        weights[n / 2][n % 2 * 2 + half] = ptx::pack(low, high, bf16{});
      }
#pragma unroll
      for (int d = 0; d < kD; d++) {
        out[d][2 * half] *= rescale;
        out[d][2 * half + 1] *= rescale;
      }
    }
  }

  // The outputs of the warp's 16 rows, from `row` on, of which the first `left` are there.
  template <int kD>
  FASTATTN_DEVICE void store(const float (&out)[kD][4], bf16* row, int left) const {
    const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float over_sum = 1.0f / quad_sum(row_sum[half]);
      if (group + 8 * half >= left) continue;
      auto* pairs = reinterpret_cast<uint32_t*>(row + (group + 8 * half) * 8 * kD);
#pragma unroll
      for (int d = 0; d < kD; d++) {
        pairs[4 * d + t] =
            ptx::pack(out[d][2 * half] * over_sum, out[d][2 * half + 1] * over_sum, bf16{});
      }
    }
  }
};

}  // namespace ladder
