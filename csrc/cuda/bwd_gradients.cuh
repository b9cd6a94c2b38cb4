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
  // Where there is no softcap, 8 · kPart columns are taken at a time of fragments that are wide.
  template <int kPart = 4, int kN, class Stats>
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
    } else if (kN >= 8 && kPart > 1 && !(b_.fwd.softcap > 0)) {
      apply_parts<kN >= 8 ? kPart : 1, false>(weights, dweights, window, inside, at, stats);
    } else {
      apply_parts<1, true>(weights, dweights, window, inside, at, stats);
    }
  }

  // The same for one score, by a lane on its own.
  FASTATTN_DEVICE void apply_alone(float& weight, float& dweight, const KernelWindow& window,
                                   Position at, float2 lse_delta) const {
    float weights[1][1][4] = {{{weight}}}, dweights[1][1][4] = {{{dweight}}};
    apply_rich<true>(
        weights, dweights, window, false, at, [&](int, int, int) { return lse_delta; },
        [&](int) { return [&](int, int) { return mods_.keeps(at); }; });
    weight = weights[0][0][0];
    dweight = dweights[0][0][0];
  }

 private:
  // 8 · kPart columns at a time, each option being asked for once. What scores need in between
  // takes registers, most of all softcap's slopes.
  template <int kPart, bool kCaps, int kN, class Stats>
  FASTATTN_DEVICE void apply_parts(float (&weights)[1][kN][4], float (&dweights)[1][kN][4],
                                   const KernelWindow& window, bool inside, Position at,
                                   const Stats& stats) const {
    static_assert(kN % kPart == 0);
#pragma unroll
    for (int first = 0; first < kN; first += kPart) {
      const Position part{at.row, at.column + 8 * first};
      apply_rich<kCaps>(
          reinterpret_cast<float (&)[1][kPart][4]>(weights[0][first]),
          reinterpret_cast<float (&)[1][kPart][4]>(dweights[0][first]), window, inside, part,
          [&](int n, int half, int e) { return stats(first + n, half, e); },
          [&](int n) {
            return typename ScoreMods<T, kRows>::Kept(mods_, {part.row, part.column + 8 * n});
          });
    }
  }

  // kept_of(n) says which elements (half, e) of 8 columns dropout keeps.
  template <bool kCaps, int kN, class Stats, class KeptOf>
  FASTATTN_DEVICE void apply_rich(float (&weights)[1][kN][4], float (&dweights)[1][kN][4],
                                  const KernelWindow& window, bool inside, Position at,
                                  const Stats& stats, const KeptOf& kept_of) const {
    const AttnFwdParams& p = b_.fwd;
    mods_.cap(weights);
    float slopes[1][kN][4];
    if (kCaps && p.softcap > 0) {
      const float per_cap = ptx::rcp(p.softcap);
      for_each_element(slopes, [&](float& slope, int m, int n, int half, int e) {
        const float t = weights[m][n][2 * half + e] * per_cap;
        slope = 1.0f - t * t;
      });
    }
    mods_.add(weights, at);
    if (!inside) fill_outside(weights, window, at, -INFINITY);
#pragma unroll
    for (int n = 0; n < kN; n++) {
      // `factor`: 0, or what is kept is multiplied by.
      const auto weigh = [&](const auto& factor) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float &weight = weights[0][n][i], &dweight = dweights[0][n][i];
          const float2 lse_delta = stats(n, i / 2, i % 2);
          const bool hidden = weight == -INFINITY;
          const float prob = ptx::ex2((weight - lse_delta.x) * kLog2E);
          const float kept = factor(i / 2, i % 2);
          weight = hidden ? 0.0f : prob * kept;
          dweight = hidden ? 0.0f : prob * (dweight * kept - lse_delta.y);
        }
      };
      if (p.seed) {
        const auto kept = kept_of(n);
        weigh([&](int half, int e) { return kept(half, e) ? p.dropout_scale : 0.0f; });
      } else {
        weigh([](int, int) { return 1.0f; });
      }
    }
    if (kAddsBias && b_.dbias) add_dbias(dweights, at);
    if (kCaps && p.softcap > 0) {
      for_each_element(dweights, [&](float& dweight, int m, int n, int half, int e) {
        dweight *= slopes[m][n][2 * half + e];
      });
    }
  }

  // Elements of dbias that several scores share are summed in no particular order.
  template <int kN>
  FASTATTN_DEVICE void add_dbias(float (&dscores)[1][kN][4], Position at) const {
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
