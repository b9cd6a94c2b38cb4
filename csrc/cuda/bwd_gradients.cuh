// What attention's backward makes of raw products, on accumulator fragments: P and dS.
#pragma once

#include "../block_range.h"
#include "elements.cuh"
#include "score_mods.cuh"
#include "work_order.cuh"

namespace fastattn::cuda {

struct AttnBwdLaunch {
  AttnBwdParams params;
  WorkOrder order;
  float *lse, *delta;  // (B, H_q, S_q): lse is +inf where a row saw no key
  bool aligned;        // rows of q, k, v, dout can be moved 16 bytes at a time
  bool grads_aligned;  // of dq, dk, dv
};

// What becomes of fragments of S and dP; one of the kernels that see a score adds up dbias.
template <class T, Rows kRows, bool kAddsBias = kRows == Rows::kQueries,
          Scores kScores = Scores::kRich>
class Gradients {
 public:
  FASTATTN_DEVICE Gradients(const AttnBwdParams& b, const Sequence& s, const Window& window,
                            int head)
      : b_(b), head_(head), batch_(s.batch), mods_(b.fwd, s, window, head) {}

  // From raw products and dP, with lse and delta of element (m, n, half, e)'s query as
  // stats(n, half, e): `weights` become P after dropout, `dweights` dS before scale. What is hidden
  // gets 0 in both, whatever it holds. `inside`: nothing is outside the window. By a whole warp.
  template <int kN, class Stats>
  FASTATTN_DEVICE void apply(float (&weights)[1][kN][4], float (&dweights)[1][kN][4],
                             const KernelWindow& window, bool inside, Position at,
                             const Stats& stats) const {
    if constexpr (kScores == Scores::kPlain) {
      const float factor = b_.fwd.scale * kLog2E;
      for_each_element(weights, [&](float& weight, int m, int n, int half, int e) {
        const float2 lse_delta = stats(n, half, e);
        float& dweight = dweights[m][n][2 * half + e];
        weight = ptx::ex2(weight * factor - lse_delta.x * kLog2E);
        dweight = weight * (dweight - lse_delta.y);
      });
      if (!inside) {
        fill_outside(weights, window, at, 0.0f);
        fill_outside(dweights, window, at, 0.0f);
      }
    } else {
      // 8 columns at a time: what they need between takes registers.
#pragma unroll
      for (int n = 0; n < kN; n++) {
        const Position part{at.row, at.column + 8 * n};
        apply_rich(
            weights[0][n], dweights[0][n], window, inside, part,
            [&](int half, int e) { return stats(n, half, e); },
            [&](float (&kept)[1][1][4]) { mods_.drop(kept, part); });
      }
    }
  }

  // The same for one score, by a lane on its own.
  FASTATTN_DEVICE void apply_alone(float& weight, float& dweight, const KernelWindow& window,
                                   Position at, float2 lse_delta) const {
    float weights[4] = {weight}, dweights[4] = {dweight};
    apply_rich(
        weights, dweights, window, false, at, [&](int, int) { return lse_delta; },
        [&](float (&kept)[1][1][4]) {
          if (!mods_.keeps(at)) kept[0][0][0] = 0.0f;
        });
    weight = weights[0];
    dweight = dweights[0];
  }

 private:
  // Of a 16 × 8 fragment; drop(kept) makes those 0 that dropout drops.
  template <class Stats, class Drop>
  FASTATTN_DEVICE void apply_rich(float (&raw)[4], float (&draw)[4], const KernelWindow& window,
                                  bool inside, Position at, const Stats& stats,
                                  const Drop& drop) const {
    const AttnFwdParams& p = b_.fwd;
    float weights[1][1][4] = {{{raw[0], raw[1], raw[2], raw[3]}}};
    mods_.cap(weights);
    float slopes[1][1][4] = {};
    if (p.softcap > 0) {
      const float per_cap = ptx::rcp(p.softcap);
      for_each_element(slopes, [&](float& slope, int m, int n, int half, int e) {
        const float t = weights[m][n][2 * half + e] * per_cap;
        slope = 1.0f - t * t;
      });
    }
    mods_.add(weights, at);
    if (!inside) fill_outside(weights, window, at, -INFINITY);
    float kept[1][1][4] = {};  // 0, or what is kept is multiplied by
    if (p.seed) {
      for_each_element(kept, [&](float& factor, int, int, int, int) { factor = p.dropout_scale; });
      drop(kept);
#pragma unroll
      for (int i = 0; i < 4; i++) draw[i] *= kept[0][0][i];
    }
    float dscores[1][1][4];
    for_each_element(weights, [&](float& weight, int m, int n, int half, int e) {
      const float2 lse_delta = stats(half, e);
      const int i = 2 * half + e;
      const bool hidden = weight == -INFINITY;
      const float prob = ptx::ex2((weight - lse_delta.x) * kLog2E);
      raw[i] = hidden ? 0.0f : prob;
      dscores[m][n][i] = hidden ? 0.0f : prob * (draw[i] - lse_delta.y);
    });
    if (p.seed) {
#pragma unroll
      for (int i = 0; i < 4; i++) raw[i] *= kept[0][0][i];
    }
    if (kAddsBias && b_.dbias) add_dbias(dscores, at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      draw[i] = p.softcap > 0 ? dscores[0][0][i] * slopes[0][0][i] : dscores[0][0][i];
    }
  }

  // Elements of dbias that several scores share are summed in no particular order.
  FASTATTN_DEVICE void add_dbias(float (&dscores)[1][1][4], Position at) const {
    const ScoreStrides stride = ScoreMods<T, kRows>::oriented(b_.dbias_stride);
    float* dbias = b_.dbias + batch_ * stride.batch + head_ * stride.head + at.row * stride.row +
                   at.column * stride.col;
    mods_.for_each_there(dscores, at, [&](float& d, int row, int column) {
      if (d != 0.0f) atomicAdd(dbias + row * stride.row + column * stride.col, d);
    });
  }

  const AttnBwdParams& b_;
  const int head_;
  const int64_t batch_;
  const ScoreMods<T, kRows> mods_;
};

// lse and delta of a query; a row that is not there has P = 0 by an lse of +inf.
FASTATTN_DEVICE float2 stats_at(const float* lse, const float* delta, int query, int end) {
  if (query >= end) return make_float2(INFINITY, 0.0f);
  return make_float2(lse[query], delta[query]);
}

}  // namespace fastattn::cuda
