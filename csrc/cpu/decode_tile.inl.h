// The inner loops of decoding: a tile of up to four query rows, which share loads of K and V,
// against a block of keys whose rows may lie anywhere. Lanes are head dims: K lies row-major and is
// met once, so nothing is worth transposing. Rows of q and out are fp32, in load_pair's order of
// their elements.
namespace decode {

constexpr int64_t kBlockKeys = 64;
// Between rows of scores: whole vectors may reach beyond a block's last.
constexpr int64_t kScoreStride = kBlockKeys + 16;
constexpr int kMaxTile = kLanes < 4 ? 1 : 4;

// The rows of some keys of one head, or of their values.
template <class T>
struct KeyRows {
  const T* const* heads = nullptr;  // where each key's heads begin; null = nothing
  int64_t head_stride = 0, dim = 0, offset = 0;

  const T* operator[](int64_t n) const { return heads[n] + offset; }
  KeyRows head(int64_t h) const { return {heads, head_stride, dim, h * head_stride}; }
  KeyRows from(int64_t n) const { return {heads + n, head_stride, dim, offset}; }
};

// Prefetches the rows of some keys and heads, in the order in which they lie in memory: hardware
// prefetchers then come along. A few lines go between any few multiply-adds, for processors may
// drop what comes in bursts.
template <class T>
class Prefetcher {
 public:
  Prefetcher(KeyRows<T> rows, int64_t keys, int64_t heads)
      : rows_(rows), keys_(rows.heads == nullptr ? 0 : keys), heads_(heads) {
    if (keys_ > 0) at_ = reinterpret_cast<const char*>(rows[0]);
  }

  // While as many bytes are worked on.
  FASTATTN_INLINE void advance(int64_t bytes) {
    const int64_t row_bytes = rows_.dim * int64_t(sizeof(T));
    for (; bytes > 0 && key_ < keys_; bytes -= 64) {
      prefetch_soon(at_ + byte_);
      byte_ += 64;
      if (byte_ < row_bytes) continue;
      byte_ = 0;
      at_ += rows_.head_stride * int64_t(sizeof(T));
      if (++head_ < heads_) continue;
      head_ = 0;
      if (++key_ < keys_) at_ = reinterpret_cast<const char*>(rows_[key_]);
    }
  }

 private:
  KeyRows<T> rows_;
  int64_t keys_, heads_;
  int64_t key_ = 0, head_ = 0, byte_ = 0;
  const char* at_ = nullptr;  // the row
};

// s[r][n] = q_r · k_n for `count` keys; up to a vector of rubbish behind. `ahead` may be null.
template <int kTile, class T>
FASTATTN_INLINE void dot_products(const float* q, int64_t ldq, KeyRows<T> k, int64_t count,
                                  Prefetcher<T>* ahead, float* s) {
  constexpr int kKeys = kLanes / kTile;
  const int64_t dim = k.dim;
  for (int64_t n = 0; n < count; n += kKeys) {
    const T* rows[kKeys];
    Vec acc[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; i++) rows[i] = k[std::min(n + i, count - 1)];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) acc[i] = zero();
    int64_t d = 0;
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; i++) {
        constexpr int kAtOnce = std::min(4, kKeys);
        if (ahead && i % kAtOnce == 0) ahead->advance(kAtOnce * 2 * kLanes * sizeof(T));
        const Pair x = load_pair(rows[i] + d);
#pragma GCC unroll 4
        for (int r = 0; r < kTile; r++) {
          Vec& a = acc[r * kKeys + i];
          a = fmadd(x.a, load(q + r * ldq + d), a);
          a = fmadd(x.b, load(q + r * ldq + d + kLanes), a);
        }
      }
    }
    for (; d < dim; d += kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; i++) {
        const Vec x = load_upto(rows[i] + d, dim - d);
#pragma GCC unroll 4
        for (int r = 0; r < kTile; r++) {
          Vec& a = acc[r * kKeys + i];
          a = fmadd(x, load(q + r * ldq + d), a);
        }
      }
    }
    alignas(64) float results[kLanes];  // (kTile, kKeys)
    store(results, sums(acc));
    for (int r = 0; r < kTile; r++) {
      std::copy_n(results + r * kKeys, kKeys, s + r * kScoreStride + n);
    }
  }
}

// Softcap and ALiBi on a row of scores; its first key lies `distance` before the query's position.
inline void modify_scores(float* s, int64_t count, float softcap, float slope, float distance) {
  if (softcap > 0) {
    for (int64_t n = 0; n < count; n += kLanes) {
      store(s + n, broadcast(softcap) * tanh(load(s + n) * broadcast(1 / softcap)));
    }
  }
  if (slope != 0) {
    for (int64_t n = 0; n < count; n++) s[n] -= slope * std::fabs(distance - float(n));
  }
}

// Brings a row's maximum and sum up to date with its next scores and turns them into exp(s − max),
// zeros behind up to a whole vector. Returns what the row's earlier terms must be multiplied by.
FASTATTN_INLINE float online_softmax(float* s, int64_t count, float& row_max, float& row_sum) {
  std::fill(s + count, s + round_up(count, kLanes), -INFINITY);
  const float old_max = row_max;
  Vec most = broadcast(old_max);
  for (int64_t n = 0; n < count; n += kLanes) most = max(load(s + n), most);
  row_max = max(most);
  Vec total = zero();
  for (int64_t n = 0; n < count; n += kLanes) {
    const Vec p = exp(load(s + n) - broadcast(row_max));
    store(s + n, p);
    total = total + p;
  }
  const float scale = row_max == old_max ? 1.0f : std::exp(old_max - row_max);
  row_sum = row_sum * scale + sum(total);
  return scale;
}

// out[r] = out[r]·scale[r] + Σ_n p[r][n]·v_n in columns [c, c + 2·kPairs·kLanes).
template <int kTile, int kPairs, class T>
FASTATTN_INLINE void add_columns(const float* p, const float* scale, KeyRows<T> v, int64_t count,
                                 int64_t c, Prefetcher<T>* ahead, float* out, int64_t ld) {
  Vec acc[kTile][2 * kPairs];
#pragma GCC unroll 4
  for (int r = 0; r < kTile; r++) {
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kPairs; i++) {
      acc[r][i] = load(out + r * ld + c + i * kLanes) * broadcast(scale[r]);
    }
  }
  for (int64_t n = 0; n < count; n++) {
    if (ahead) ahead->advance(2 * kPairs * kLanes * sizeof(T));
    const T* row = v[n] + c;
#pragma GCC unroll 4
    for (int i = 0; i < kPairs; i++) {
      const Pair x = load_pair(row + i * 2 * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kTile; r++) {
        const Vec weight = broadcast(p[r * kScoreStride + n]);
        acc[r][2 * i] = fmadd(x.a, weight, acc[r][2 * i]);
        acc[r][2 * i + 1] = fmadd(x.b, weight, acc[r][2 * i + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTile; r++) {
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kPairs; i++) store(out + r * ld + c + i * kLanes, acc[r][i]);
  }
}

// The same in all columns.
template <int kTile, class T>
FASTATTN_INLINE void add_values(const float* p, const float* scale, KeyRows<T> v, int64_t count,
                                Prefetcher<T>* ahead, float* out, int64_t ld) {
  // At most 16 accumulators with 32 registers, 8 with 16.
  constexpr int kPairs = std::min(4, std::max(1, kLanes / (2 * kTile)));
  int64_t c = 0;
  for (; c + 2 * kPairs * kLanes <= v.dim; c += 2 * kPairs * kLanes) {
    add_columns<kTile, kPairs>(p, scale, v, count, c, ahead, out, ld);
  }
  for (; c + 2 * kLanes <= v.dim; c += 2 * kLanes) {
    add_columns<kTile, 1>(p, scale, v, count, c, ahead, out, ld);
  }
  for (; c < v.dim; c += kLanes) {
    for (int r = 0; r < kTile; r++) {
      Vec acc = load(out + r * ld + c) * broadcast(scale[r]);
      for (int64_t n = 0; n < count; n++) {
        if (ahead && r == 0) ahead->advance(kLanes * sizeof(T));
        acc = fmadd(load_upto(v[n] + c, v.dim - c), broadcast(p[r * kScoreStride + n]), acc);
      }
      store(out + r * ld + c, acc);
    }
  }
}

}  // namespace decode
