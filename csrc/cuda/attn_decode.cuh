// What the decode kernels share: which rows and keys a block takes, which keys a row sees, and how
// partial results become out and lse.
//
// The rows of a KV head are the queries of its group of query heads, the heads of a query side by
// side: row = i · group_size + h. A block takes a tile of them, so that K and V are read once for
// all, and one split of the keys.
#pragma once

#include <cfloat>
#include <cmath>

#include "../block_range.h"
#include "kv_cache.cuh"
#include "launch.cuh"
#include "score_mods.cuh"
#include "tiles.cuh"
#include "vector.cuh"

namespace fastattn::cuda::decode {

constexpr int kThreads = 128;
constexpr int kMinSplitKeys = 64;  // of a split: with fewer, merging costs more than it saves
constexpr int kMaxSplits = 128;
constexpr int kSlice = 8;  // elements a lane holds of a row of K or V

// Running softmax of a row: exp(s − row_max) is what scores are summed as. row_max is finite from
// the start, so that −inf − row_max is not NaN.
struct RowState {
  float row_max = -FLT_MAX, row_sum = 0;
};

struct KernelParams : AttnDecodeParams {
  Divider by_page_size, by_group_size;
  int splits, row_tiles;
  // Of each row and split, if there is more than one: Σ exp(s − row_max)·v and the state.
  float* partial_out;        // (B, H_q, S_q, splits, D_v)
  RowState* partial_states;  // (B, H_q, S_q, splits)

  FASTATTN_DEVICE int64_t row_index(int64_t b, int head, int query) const {
    return (b * heads_q + head) * seqlen_q + query;
  }
};

// Scores that only the tensor cores' kernel makes. Here the others are plain: scale, softcap,
// ALiBi.
inline bool is_rich(const AttnDecodeParams& p) { return p.mask || p.bias || p.seed; }

// Aligned tiles of kMmaRows rows of 16-bit elements, D and D_v up to kMmaMaxDims.
constexpr int kMmaRows = 16;
constexpr int kMmaMaxDims = 128;
void launch_sm75(const KernelParams& p, const Device& device, const std::string& what);  // fp16
void launch_sm80(const KernelParams& p, const Device& device, const std::string& what);

// Half-open.
struct Keys {
  int begin, end;
};

// Where the queries and keys of batch entry b lie, beyond its batch stride, and how many there are.
// Asked again when the keys are through, so that nothing of it is kept in registers.
FASTATTN_DEVICE Sequence sequence_at(const KernelParams& p, int64_t b) {
  if (p.cu_seqlens_q) {
    const int64_t q = p.cu_seqlens_q[b], k = p.cu_seqlens_k[b];
    return {b, q, k, p.cu_seqlens_q[b + 1] - q, p.cu_seqlens_k[b + 1] - k};
  }
  return {b, 0, 0, p.seqlen_q, (p.cache_seqlens ? p.cache_seqlens[b] : 0) + p.seqlen_new};
}

// What block blockIdx.x takes of the problem.
struct Tile {
  int batch;
  int head_k, first_row, split;
  int group_size, diagonal;  // query i stands on key i + diagonal
  int first_key, last_key;   // relative to a query's number: the window it sees
  Keys keys;                 // of this split, seen by at least one row

  template <int kRows>
  static FASTATTN_DEVICE Tile of_block(const KernelParams& p) {
    Tile t;
    int64_t rest = blockIdx.x;  // tiles of the same keys come one after another: L2 has them still
    t.first_row = int(rest % p.row_tiles) * kRows;
    rest /= p.row_tiles;
    t.split = int(rest % p.splits);
    rest /= p.splits;
    t.head_k = int(rest % p.heads_k);
    t.batch = int(rest / p.heads_k);

    t.group_size = int(p.heads_q / p.heads_k);
    const Sequence s = sequence_at(p, t.batch);
    const int seqlen_q = int(s.seqlen_q), length = int(s.seqlen_k);
    const int all = length + seqlen_q;
    t.diagonal = length - seqlen_q;
    t.first_key = t.diagonal - (p.window_left < 0 ? all : int(min(p.window_left, int64_t(all))));
    t.last_key = t.diagonal + (p.window_right < 0 ? all : int(min(p.window_right, int64_t(all))));

    const int last_row = min(t.first_row + kRows, t.group_size * seqlen_q) - 1;
    const int first_query = p.by_group_size.divide(t.first_row);
    const int last_query = p.by_group_size.divide(max(last_row, 0));
    const int leftpad = p.cache_leftpad ? p.cache_leftpad[t.batch] : 0;
    const int begin = max(leftpad, first_query + t.first_key);
    const int end = min(length, last_query + t.last_key + 1);
    const int share = max((end - begin + p.splits - 1) / p.splits, kMinSplitKeys);
    t.keys.begin = begin + t.split * share;
    t.keys.end = t.first_row <= last_row ? min(end, t.keys.begin + share) : t.keys.begin;
    return t;
  }

  // For keys from keys.begin on.
  FASTATTN_DEVICE bool sees(int query, int key) const {
    return key >= query + first_key && key <= query + last_key && key < keys.end;
  }
};

// One row of a tile.
struct Row {
  int query, head;
  bool exists;

  FASTATTN_DEVICE Row(const Tile& t, int r, const KernelParams& p, const Sequence& s) {
    const int row = t.first_row + r;
    query = p.by_group_size.divide(row);
    head = t.head_k * t.group_size + row - query * t.group_size;
    exists = query < s.seqlen_q;
  }
};

// The score of a raw product q·k; distance = |position of the query − key|.
FASTATTN_DEVICE float score(float product, float slope, int distance, const KernelParams& p) {
  float s = product * p.scale;
  if (p.softcap > 0) s = p.softcap * tanhf(s / p.softcap);
  if (p.alibi_slopes) s -= slope * float(distance);
  return s;
}

FASTATTN_DEVICE float alibi_slope(const KernelParams& p, int64_t b, int head) {
  return p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride_batch + head] : 0.0f;
}

// One row's scores from raw products, and which of its weights dropout keeps.
template <class T, Scores kScores>
class RowScores;
template <class T>
class RowScores<T, Scores::kPlain> {
 public:
  FASTATTN_DEVICE RowScores(const KernelParams& p, const Tile& t, const Sequence&, const Row& row)
      : p_(p),
        query_(row.query),
        diagonal_(t.diagonal),
        slope_(row.exists ? alibi_slope(p, t.batch, row.head) : 0.0f) {}
  FASTATTN_DEVICE float operator()(float product, int key) const {
    return score(product, slope_, abs(query_ + diagonal_ - key), p_);
  }
  FASTATTN_DEVICE bool keeps(int) const { return true; }
  // Whether a row of queries may not see a key that another one sees.
  FASTATTN_DEVICE static bool hides_keys(const KernelParams& p) { return p.seqlen_q > 1; }

 private:
  const KernelParams& p_;
  const int query_, diagonal_;
  const float slope_;
};
template <class T>
class RowScores<T, Scores::kRich> {
 public:
  FASTATTN_DEVICE RowScores(const KernelParams& p, const Tile&, const Sequence& s, const Row& row)
      : query_(row.query),
        mods_(p, s, make_window(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right), row.head) {}
  FASTATTN_DEVICE float operator()(float product, int key) const {
    float scores[1][1][4] = {{{product}}};
    mods_.apply(scores, {query_, key});
    return scores[0][0][0];
  }
  FASTATTN_DEVICE bool keeps(int key) const { return mods_.keeps({query_, key}); }
  FASTATTN_DEVICE static bool hides_keys(const KernelParams& p) { return p.seqlen_q > 1 || p.mask; }

 private:
  const int query_;
  const ScoreMods<T> mods_;
};

// A lane's part of a row.
template <class T>
struct Slice {
  uint4 vectors[kSlice / kVec<T>];

  FASTATTN_DEVICE void unpack_into(float (&x)[kSlice]) const {
#pragma unroll
    for (int n = 0; n < kSlice / kVec<T>; n++) {
      float part[kVec<T>];
      unpack<T>(vectors[n], part);
#pragma unroll
      for (int i = 0; i < kVec<T>; i++) x[n * kVec<T> + i] = part[i];
    }
  }
};

// The first `count` elements at x, at most kSlice, zeros behind. Nothing is read where count ≤ 0.
// kAligned: x is a multiple of 16 bytes, count one of kSlice.
template <bool kAligned, class T>
FASTATTN_DEVICE Slice<T> load_slice(const T* x, int count) {
  Slice<T> slice;
#pragma unroll
  for (int n = 0; n < kSlice / kVec<T>; n++) {
    if constexpr (kAligned) {
      slice.vectors[n] = count > 0 ? load_vector(x + n * kVec<T>) : uint4{0, 0, 0, 0};
    } else {
      float part[kVec<T>];
#pragma unroll
      for (int i = 0; i < kVec<T>; i++) {
        const int d = n * kVec<T> + i;
        part[i] = d < count ? to_float(x[d]) : 0.0f;
      }
      slice.vectors[n] = pack<T>(part);
    }
  }
  return slice;
}

// What remains of a row once its keys are through: the sinks join, lse and out are written.
struct Finish {
  float factor;  // of out

  FASTATTN_DEVICE Finish(const KernelParams& p, int64_t b, int head, int64_t q_row, RowState state,
                         bool writes_lse) {
    float scale = 1, row_max = state.row_max, row_sum = state.row_sum;
    if (p.sinks) {
      const float most = fmaxf(row_max, p.sinks[head]);
      scale = exp_of(row_max - most);
      row_sum = row_sum * scale + exp_of(p.sinks[head] - most);
      row_max = most;
    }
    const bool empty = row_sum == 0;
    factor = empty ? 0.0f : scale / row_sum;
    if (writes_lse) {
      p.lse[b * p.lse_stride_batch + head * p.lse_stride_head + q_row] =
          empty ? -INFINITY : row_max + logf(row_sum);
    }
  }
};

// A row of q, and one of out by the query's row in the tensor; a head's first key or value.
template <class T>
FASTATTN_DEVICE const T* query_at(const KernelParams& p, const Sequence& s, const Row& row) {
  return static_cast<const T*>(p.q) + s.batch * p.q_stride.batch +
         (s.q_row + row.query) * p.q_stride.seq + row.head * p.q_stride.head;
}
template <class T>
FASTATTN_DEVICE T* out_row(const KernelParams& p, int64_t b, int head, int64_t q_row) {
  return static_cast<T*>(p.out) + b * p.out_stride.batch + q_row * p.out_stride.seq +
         head * p.out_stride.head;
}
template <class T>
FASTATTN_DEVICE const T* keys_at(const void* cache, const Strides& stride, const Sequence& s,
                                 int head_k) {
  return static_cast<const T*>(cache) + s.k_row * stride.seq + head_k * stride.head;
}

// What is kept is multiplied by this.
template <Scores kScores>
FASTATTN_DEVICE float kept_scale(const KernelParams& p) {
  return kScores == Scores::kRich && p.seed ? p.dropout_scale : 1.0f;
}

// Element d of Σ exp(s − row_max)·v over the keys that the row sees, one thread on its own.
template <class T, Scores kScores>
FASTATTN_DEVICE float recompute(const KernelParams& p, const Tile& t, const Row& row, int d,
                                float row_max) {
  const Sequence sequence = sequence_at(p, t.batch);
  const T* q = query_at<T>(p, sequence, row);
  const T* gK = keys_at<T>(p.k_cache, p.k_stride, sequence, t.head_k);
  const T* gV = keys_at<T>(p.v_cache, p.v_stride, sequence, t.head_k);
  const CachePlace place(p, t.batch, p.by_page_size);
  const RowScores<T, kScores> score(p, t, sequence, row);
  float out = 0;
  for (int key = t.keys.begin; key < t.keys.end; key++) {
    if (!t.sees(row.query, key)) continue;
    const CachePlace::Position at = place.find(key);
    const T* k = gK + offset_of(at, p.k_stride);
    const T* v = gV + offset_of(at, p.v_stride);
    float product = 0;
    for (int i = 0; i < p.head_dim; i++) product += to_float(q[i]) * to_float(k[i]);
    const float s = score(product, key);
    if (s == -INFINITY) continue;
    out += (score.keeps(key) ? exp_of(s - row_max) : 0.0f) * to_float(v[d]);
  }
  return out * kept_scale<kScores>(p);
}

// Where element d of a team's row lies in sOut (kTeams, kRows, kDims): rearranged among 16, so that
// what a warp writes at once goes to different banks, be it every 8th element of a row or the
// fragment of a product.
template <int kRows, int kDims>
FASTATTN_DEVICE int out_index(int team, int row, int d) {
  const int part = d / 32;
  const int turn = (((part + team * (kDims / 32)) ^ row) & 7) | (part & 1) << 3;
  return (team * kRows + row) * kDims + (d ^ turn);
}

// The results of several teams of threads that took different keys, merged in their order and
// written: sOut by out_index, sStates (kTeams, kRows). kShared: rows that don't see a key
// had its value times 0 added, and if that is not finite, neither are they; they are done again.
template <class T, Scores kScores, bool kShared, int kTeams, int kRows, int kDims>
FASTATTN_DEVICE void write_tile(const KernelParams& p, const Tile& t, const float* sOut,
                                const RowState* sStates) {
  const Sequence s = sequence_at(p, t.batch);
  for (int r = 0; r < kRows; r++) {
    const Row row(t, r, p, s);
    if (!row.exists) return;
    RowState total;
    float scale[kTeams];
#pragma unroll
    for (int team = 0; team < kTeams; team++) {
      total.row_max = fmaxf(total.row_max, sStates[team * kRows + r].row_max);
    }
#pragma unroll
    for (int team = 0; team < kTeams; team++) {
      const RowState state = sStates[team * kRows + r];
      scale[team] = exp_of(state.row_max - total.row_max);
      total.row_sum += state.row_sum * scale[team];
    }

    const bool whole = p.splits == 1;
    const int64_t index = p.row_index(t.batch, row.head, row.query) * p.splits + t.split;
    float factor = 1;
    if (whole) {
      factor = Finish(p, t.batch, row.head, s.q_row + row.query, total, threadIdx.x == 0).factor;
    } else if (threadIdx.x == 0) {
      p.partial_states[index] = total;
    }
    for (int d = threadIdx.x; d < p.head_dim_v; d += kThreads) {
      float out = 0;
#pragma unroll
      for (int team = 0; team < kTeams; team++) {
        out += scale[team] * sOut[out_index<kRows, kDims>(team, r, d)];
      }
      if (kShared && RowScores<T, kScores>::hides_keys(p) && !(fabsf(out) <= FLT_MAX)) {
        out = recompute<T, kScores>(p, t, row, d, total.row_max);
      }
      if (whole) {
        out_row<T>(p, t.batch, row.head, s.q_row + row.query)[d] = from_float<T>(out * factor);
      } else {
        p.partial_out[index * p.head_dim_v + d] = out;
      }
    }
  }
}

}  // namespace fastattn::cuda::decode
