// Between Q·Kᵀ and the softmax, on accumulator fragments: window edges, softcap, bias, ALiBi, mask
// and dropout.
//
// A fragment's element [m][n][2·half + e] is the score of query row + 16·m + 8·half with key
// column + 8·n + e, where row and column are this thread's first; or the same transposed, with the
// key's row and the query's column.
#pragma once

#include <cstring>
#include <type_traits>

#include "../block_range.h"
#include "elements.cuh"
#include "philox.cuh"
#include "ptx.cuh"
#include "softmax.cuh"
#include "tiles.cuh"
#include "vector.cuh"

namespace fastattn::cuda {

inline bool is_rich(const AttnFwdParams& p) {
  return !(p.scale > 0) || p.softcap > 0 || p.mask || p.bias || p.alibi_slopes || p.seed;
}

// What the rows of a fragment are; its columns are the other.
enum class Rows { kQueries, kKeys };

// A thread's first row and column.
struct Position {
  int row, column;
};
FASTATTN_DEVICE Position thread_position(int warp_row, int block_column) {
  const int lane = ptx::anew(threadIdx.x) % 32;
  return {warp_row + lane / 4, block_column + lane % 4 * 2};
}

// Calls body(element, m, n, half, e) for every element of a fragment.
template <int kM, int kN, class Body>
FASTATTN_DEVICE void for_each_element(float (&scores)[kM][kN][4], const Body& body) {
#pragma unroll
  for (int m = 0; m < kM; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int n = 0; n < kN; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) body(scores[m][n][2 * half + e], m, n, half, e);
      }
    }
  }
}

struct IntRange {  // half-open
  int begin, end;
};

// The window in a kernel's terms: query i sees keys [i + first, i + end), as far as there are keys.
// Lengths are below 2^29, so that nothing overflows.
struct KernelWindow {
  int first, end, seqlen_k;

  FASTATTN_DEVICE explicit KernelWindow(const Window& w)
      : first(static_cast<int>(w.diagonal - w.left)),
        end(static_cast<int>(w.diagonal + w.right + 1)),
        seqlen_k(static_cast<int>(w.seqlen_k)) {}

  // The queries that see key j: [j + first, j + end), as far as there are queries.
  FASTATTN_DEVICE KernelWindow transposed(int seqlen_q) const {
    KernelWindow w = *this;
    w.first = 1 - end;
    w.end = 1 - first;
    w.seqlen_k = seqlen_q;
    return w;
  }

  // Whether each of these queries sees each of these keys.
  FASTATTN_DEVICE bool shows(IntRange queries, IntRange keys) const {
    return keys.begin >= queries.end - 1 + first && keys.end <= queries.begin + end &&
           keys.end <= seqlen_k;
  }
};

// What is outside the window, or behind the last key, becomes `value`.
template <int kM, int kN>
FASTATTN_DEVICE void fill_outside(float (&scores)[kM][kN][4], const KernelWindow& window,
                                  Position at, float value) {
  const int diagonal = at.row - at.column, tail = window.seqlen_k - at.column;
#pragma unroll
  for (int m = 0; m < kM; m++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int begin = diagonal + 16 * m + 8 * half + window.first;
      const int end = min(diagonal + 16 * m + 8 * half + window.end, tail);
#pragma unroll
      for (int n = 0; n < kN; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int key = 8 * n + e;
          if (key < begin || key >= end) scores[m][n][2 * half + e] = value;
        }
      }
    }
  }
}
template <int kM, int kN>
FASTATTN_DEVICE void hide_outside(float (&scores)[kM][kN][4], const KernelWindow& window,
                                  Position at) {
  fill_outside(scores, window, at, -INFINITY);
}

// tanh within 3e-7 relative, never beyond ±1; NaN stays NaN. Up to |x| = 0.8, where 1 − 2 / (1 +
// exp(2x)) would cancel, csrc/cpu/vec_math.inl.h's odd polynomial.
FASTATTN_DEVICE float fast_tanh(float x) {
  const float u = x * x;
  float p = 1.5847563e-3f;
  p = fmaf(p, u, -7.4095576e-3f);
  p = fmaf(p, u, 2.1302991e-2f);
  p = fmaf(p, u, -5.3852331e-2f);
  p = fmaf(p, u, 1.3332221e-1f);
  p = fmaf(p, u, -3.3333299e-1f);
  const float far = 1.0f - 2.0f * ptx::rcp(1.0f + ptx::ex2(2.0f * kLog2E * x));
  return u <= 0.64f ? fmaf(x * u, p, x) : far;
}

// Two that lie side by side, in one load.
template <class Value>
struct Pair {
  Value first, second;
};
template <class Value>
FASTATTN_DEVICE bool is_aligned_pair(const Value* from) {
  return reinterpret_cast<uintptr_t>(from) % sizeof(Pair<Value>) == 0;
}
template <class Value>
FASTATTN_DEVICE Pair<Value> load_pair(const Value* from) {
  using Word = std::conditional_t<sizeof(Value) == 1, uint16_t,
                                  std::conditional_t<sizeof(Value) == 2, uint32_t, uint64_t>>;
  const Word word = *reinterpret_cast<const Word*>(from);
  Pair<Value> pair;
  memcpy(&pair, &word, sizeof pair);
  return pair;
}

// The contract's options for one head of one sequence.
template <class T, Rows kRows = Rows::kQueries>
class ScoreMods {
 public:
  FASTATTN_DEVICE ScoreMods(const ScoreParams& p, const Sequence& s, const Window& window, int head)
      : p_(p),
        batch_(static_cast<uint32_t>(s.batch)),
        head_(head),
        rows_(static_cast<int>(kRows == Rows::kQueries ? s.seqlen_q : s.seqlen_k)),
        columns_(static_cast<int>(kRows == Rows::kQueries ? s.seqlen_k : s.seqlen_q)),
        diagonal_(static_cast<int>(window.diagonal)),
        threshold_(static_cast<uint32_t>(lesser(p.dropout_threshold, 0xffffffff))) {}

  // Raw products become scores in natural units.
  template <int kM, int kN>
  FASTATTN_DEVICE void apply(float (&scores)[kM][kN][4], Position at) const {
    cap(scores);
    add(scores, at);
  }

  // Scale and softcap.
  template <int kM, int kN>
  FASTATTN_DEVICE void cap(float (&scores)[kM][kN][4]) const {
    if (p_.softcap > 0) {
      const float factor = p_.scale * ptx::rcp(p_.softcap);
      for_each_element(
          scores, [&](float& s, int, int, int, int) { s = p_.softcap * fast_tanh(s * factor); });
    } else {
      for_each_element(scores, [&](float& s, int, int, int, int) { s *= p_.scale; });
    }
  }

  // Bias, ALiBi and mask. Queries and keys that are not there read nothing.
  template <int kM, int kN>
  FASTATTN_DEVICE void add(float (&scores)[kM][kN][4], Position at) const {
    if (p_.bias) {
      if (p_.bias_dtype == DType::kF32) {
        add_bias(static_cast<const float*>(p_.bias), scores, at);
      } else {
        add_bias(static_cast<const T*>(p_.bias), scores, at);
      }
    }
    if (p_.alibi_slopes) {
      // One distance is converted, the others are that many further: conversions are as slow as
      // ex2.
      const float slope = p_.alibi_slopes[batch_ * p_.alibi_stride_batch + head_];
      constexpr int kSign = kRows == Rows::kQueries ? 1 : -1;
      const float first = static_cast<float>(kSign * (at.row - at.column) + diagonal_);
      for_each_element(scores, [&](float& s, int m, int n, int half, int e) {
        const int further = kSign * (16 * m + 8 * half - 8 * n - e);
        s -= slope * fabsf(first + static_cast<float>(further));
      });
    }
    if (p_.mask) {
      for_each_value(p_.mask, p_.mask_stride, scores, at, [](float& s, uint8_t attend) {
        if (!attend) s = -INFINITY;
      });
    }
  }

  // Whether dropout keeps one weight.
  FASTATTN_DEVICE bool keeps(Position at) const {
    if (!p_.seed) return true;
    if (kRows == Rows::kKeys) at = {at.column, at.row};
    uint32_t words[4] = {static_cast<uint32_t>(at.column / 4), static_cast<uint32_t>(at.row),
                         static_cast<uint32_t>(head_), batch_};
    philox(words, static_cast<uint64_t>(*p_.seed));
    const uint32_t low = at.column & 1 ? words[1] : words[0];
    const uint32_t high = at.column & 1 ? words[3] : words[2];
    return (at.column & 2 ? high : low) >= threshold_;
  }

  // Which of this thread's elements of a 16 × 8 tile dropout keeps, by a whole warp. Lanes that
  // share counters make the words of one each, and vote on them: where rows are queries, two lanes
  // have the four keys of two counters, half a tile apart; where rows are keys, four lanes of a
  // column have those of four, of two halves and two queries.
  class Kept {
   public:
    FASTATTN_DEVICE Kept(const ScoreMods& mods, Position at) {
      constexpr bool kQueries = kRows == Rows::kQueries;
      const int lane = threadIdx.x % 32, mine = kQueries ? lane % 2 : lane / 4 % 4;
      const int query = kQueries ? at.row + 8 * mine : at.column + mine % 2;
      const int key = kQueries ? at.column : at.row + mine / 2 * 8;
      uint32_t words[4] = {static_cast<uint32_t>(key / 4), static_cast<uint32_t>(query),
                           static_cast<uint32_t>(mods.head_), mods.batch_};
      philox(words, static_cast<uint64_t>(*mods.p_.seed));
#pragma unroll
      for (uint32_t& word : words) {
        word = __ballot_sync(0xffffffffu, word >= mods.threshold_);
      }
      if (kQueries) {  // keys 2·mine and 2·mine + 1 of the counters of this lane and the other
        kept_[0] = mine ? words[2] : words[0];
        kept_[1] = mine ? words[3] : words[1];
        first_ = 1u << (lane & 30);
      } else {  // key `mine` of all four
        const uint32_t low = mine & 1 ? words[1] : words[0], high = mine & 1 ? words[3] : words[2];
        kept_[0] = kept_[1] = mine & 2 ? high : low;
        first_ = 1u << (lane & 19);
      }
    }
    FASTATTN_DEVICE bool operator()(int half, int e) const {
      return (kept_[e] & first_ << (kRows == Rows::kQueries ? half : 8 * half + 4 * e)) != 0;
    }

   private:
    uint32_t kept_[2];  // of e: a bit for each lane that made words
    uint32_t first_;    // the bit of this lane's first element
  };

  // Weights that are dropped become 0; those kept are scaled with the output.
  template <int kM, int kN>
  FASTATTN_DEVICE void drop(float (&weights)[kM][kN][4], Position at) const {
#pragma unroll
    for (int m = 0; m < kM; m++) {
#pragma unroll
      for (int n = 0; n < kN; n++) {
        const Kept kept(*this, {at.row + 16 * m, at.column + 8 * n});
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (!kept(i / 2, i % 2)) weights[m][n][i] = 0.0f;
        }
      }
    }
  }

  // Calls body(element, row, column) for those that are there, counted from `at`: column by column,
  // since what is computed for one takes registers.
  template <int kM, int kN, class Body>
  FASTATTN_DEVICE void for_each_there(float (&scores)[kM][kN][4], Position at,
                                      const Body& body) const {
#pragma unroll
    for (int n = 0; n < kN; n++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
#pragma unroll
        for (int m = 0; m < kM; m++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int row = 16 * m + 8 * half, column = 8 * n + e;
            if (at.row + row < rows_ && at.column + column < columns_) {
              body(scores[m][n][2 * half + e], row, column);
            }
          }
        }
      }
    }
  }

  // Strides along a fragment's rows and columns.
  FASTATTN_DEVICE static ScoreStrides oriented(const ScoreStrides& s) {
    return kRows == Rows::kQueries ? s : ScoreStrides{s.batch, s.head, s.col, s.row};
  }

 private:
  template <class Bias, int kM, int kN>
  FASTATTN_DEVICE void add_bias(const Bias* bias, float (&scores)[kM][kN][4], Position at) const {
    for_each_value(bias, p_.bias_stride, scores, at, [](float& s, Bias x) { s += to_float(x); });
  }

  // Calls body(score, value) for scores, each with its value in a tensor of their shape; what is
  // not there gets its neighbour's, and is hidden or not stored later. Keys that lie side by side
  // are loaded in pairs.
  template <class Value, int kM, int kN, class Body>
  FASTATTN_DEVICE void for_each_value(const Value* tensor, const ScoreStrides& strides,
                                      float (&scores)[kM][kN][4], Position at,
                                      const Body& body) const {
    const ScoreStrides stride = oriented(strides);
    const Value* from = tensor + batch_ * stride.batch + head_ * stride.head;
    const Value* rows[kM][2];
#pragma unroll
    for (int m = 0; m < kM; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        rows[m][half] = from + min(at.row + 16 * m + 8 * half, rows_ - 1) * stride.row;
      }
    }
    bool pairs = kRows == Rows::kQueries && stride.col == 1 && at.column + 8 * kN - 7 < columns_;
#pragma unroll
    for (int m = 0; m < kM; m++) {
      pairs = pairs && is_aligned_pair(rows[m][0] + at.column) &&
              is_aligned_pair(rows[m][1] + at.column);
    }
    // In parts, between which loads don't move: their values take registers.
    constexpr int kPart = 2;
#pragma unroll
    for (int first = 0; first < kN; first += kPart) {
      if (pairs) {
#pragma unroll
        for (int n = first; n < kN && n < first + kPart; n++) {
#pragma unroll
          for (int m = 0; m < kM; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const Pair<Value> pair = load_pair(rows[m][half] + at.column + 8 * n);
              body(scores[m][n][2 * half], pair.first);
              body(scores[m][n][2 * half + 1], pair.second);
            }
          }
        }
      } else {
#pragma unroll
        for (int n = first; n < kN && n < first + kPart; n++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int64_t column = min(at.column + 8 * n + e, columns_ - 1) * stride.col;
#pragma unroll
            for (int m = 0; m < kM; m++) {
#pragma unroll
              for (int half = 0; half < 2; half++) {
                body(scores[m][n][2 * half + e], rows[m][half][column]);
              }
            }
          }
        }
      }
    }
  }

  const ScoreParams& p_;
  const uint32_t batch_;
  const int head_, rows_, columns_, diagonal_;
  const uint32_t threshold_;  // of 2³², p = 1, too: what is kept then is multiplied by 0
};

}  // namespace fastattn::cuda
