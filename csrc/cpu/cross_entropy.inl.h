// Cross-entropy of (N, V) logits x: loss, lse and the gradient, row by row. With z = x, or
// softcap·tanh(x / softcap),
//
//   m = max z,  l = Σ exp(z − m),  lse = m + log l,  nll_c = log l − (z_c − m)
//   loss = (1 − ε)·w_y·nll_y + ε/V·Σ_c w_c·nll_c + z_loss·lse²
//   dz_c = p_c·a − [c = y]·t − s·w_c     where p_c = exp(z_c − m) / l, g = dloss of the row,
//          t = g·(1 − ε)·w_y,  s = g·ε/V,  a = t + s·Σ w + 2·g·z_loss·lse + dlse
//
// A row is read from memory once, in chunks that stay in L1 between their maximum and their sum of
// exponentials, and a second time, from L2, for the gradient. The backward pass takes the saved lse
// for m and sums again: at an offset of 2²⁴ the rounded lse is wrong by 1, and exp(z − lse) alone
// would be by a factor e.
//
// Plain rows have z = x and ε = 0: neither class weights nor the z-loss touch their inner loops.
// All others are rich.
namespace cross_entropy {

// Logits a chunk, at most 8 KB of fp32. One lane adds up no more than 128 of them, a row the sums
// of its chunks: rounding errors grow with the root of either number.
constexpr int64_t kChunk = 128 * kLanes;
// How far ahead of the maximum to prefetch: the hardware stops at every page's end.
constexpr int64_t kPrefetchBytes = 4096;
// Threads are handed tasks of about this many logits.
constexpr int64_t kTaskLogits = int64_t(1) << 16;
// Gradients at least this large, in a buffer of their own, are written past the caches.
constexpr int64_t kStreamBytes = int64_t(4) << 20;

struct RowStats {
  float max = -FLT_MAX;  // of z; finite even if all are −inf so far: −inf − max must not be NaN
  float sum = 0;         // Σ exp(z − max)
  float smooth = 0;      // rich: Σ w·(z − max)
  float weight = 0;      // rich: Σ w
};

FASTATTN_INLINE Vec softcapped(Vec x, float cap) {
  return cap > 0 ? broadcast(cap) * tanh(x * broadcast(1 / cap)) : x;
}

template <class T>
FASTATTN_INLINE Vec load_or(const T* x, Mask lanes, float otherwise) {
  return select(lanes, load_partial(x, lanes), broadcast(otherwise));
}

template <class T>
FASTATTN_INLINE void prefetch_ahead(const T* x, int64_t n) {
  const char* ahead = reinterpret_cast<const char*>(x) + kPrefetchBytes;
  for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64) prefetch_l2(ahead + byte);
}

// Largest of n logits, at least -FLT_MAX; NaNs are passed over (the sum will meet them).
template <class T>
FASTATTN_INLINE float chunk_max(const T* x, int64_t n) {
  const Vec least = broadcast(-FLT_MAX);
  Vec m0 = least, m1 = least, m2 = least, m3 = least;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    prefetch_ahead(x + i, 4 * kLanes);
    const Pair x0 = load_pair(x + i), x1 = load_pair(x + i + 2 * kLanes);
    m0 = max(x0.a, m0);
    m1 = max(x0.b, m1);
    m2 = max(x1.a, m2);
    m3 = max(x1.b, m3);
  }
  for (; i < n; i += kLanes) m0 = max(load_or(x + i, first_lanes(n - i), -FLT_MAX), m0);
  return max(max(max(m0, m1), max(m2, m3)));
}

// Σ exp(x − shift) of n logits.
template <bool kPrefetch, class T>
FASTATTN_INLINE float chunk_sum(const T* x, int64_t n, Vec shift) {
  Vec even = zero(), odd = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    if (kPrefetch) prefetch_ahead(x + i, 2 * kLanes);
    const Pair z = load_pair(x + i);
    even = even + exp(z.a - shift);
    odd = odd + exp(z.b - shift);
  }
  for (; i < n; i += kLanes) {
    even = even + exp(load_or(x + i, first_lanes(n - i), -INFINITY) - shift);
  }
  return sum(even + odd);
}

// Adds n logits and their class weights (null = 1) to the row's statistics.
template <bool kRich, class T>
FASTATTN_INLINE void add_chunk(const T* x, const float* weight, int64_t n, float cap,
                               RowStats& row) {
  const float old_max = row.max, here = chunk_max(x, n);
  row.max = std::max(old_max, kRich ? max(softcapped(broadcast(here), cap)) : here);
  row.sum *= std::exp(old_max - row.max);
  const Vec shift = broadcast(row.max), one = broadcast(1.0f);
  if constexpr (kRich) {
    Vec total = zero(), smooth = zero(), weights = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
      const Mask lanes = first_lanes(n - i);
      const Vec z = softcapped(load_partial(x + i, lanes), cap) - shift;
      const Vec w = weight ? load_partial(weight + i, lanes) : select(lanes, one, zero());
      total = total + select(lanes, exp(z), zero());
      smooth = smooth + select(lanes, w * z, zero());
      weights = weights + w;
    }
    row.sum += sum(total);
    row.smooth += sum(smooth) - row.weight * (row.max - old_max);
    row.weight += sum(weights);
  } else {
    row.sum += chunk_sum<false>(x, n, shift);
  }
}

template <bool kRich, class T>
RowStats row_stats(const T* x, const CrossEntropyParams& p) {
  RowStats row;
  for (int64_t c = 0; c < p.vocab; c += kChunk) {
    const float* weight = kRich && p.weight ? p.weight + c : nullptr;
    add_chunk<kRich>(x + c, weight, std::min(kChunk, p.vocab - c), p.softcap, row);
  }
  if (row.sum == 0 && p.vocab > 0)
    row.sum = NAN;  // every logit is −inf: no distribution, as in eager
  return row;
}

// The same for a plain row whose lse is known, up to rounding.
template <class T>
RowStats row_stats_from_lse(const T* x, int64_t vocab, float lse) {
  RowStats row{lse};
  for (int64_t c = 0; c < vocab; c += kChunk) {
    row.sum += chunk_sum<true>(x + c, std::min(kChunk, vocab - c), broadcast(lse));
  }
  return row;
}

// z'(x)·(a·exp(z − max) − s·w); plain: a·exp(x − max).
template <bool kRich>
FASTATTN_INLINE Vec gradient(Vec x, Vec w, float cap, Vec shift, Vec a, Vec s) {
  if constexpr (!kRich) return a * exp(x - shift);
  if (cap == 0) return a * exp(x - shift) - s * w;
  const Vec t = tanh(x * broadcast(1 / cap));
  return (broadcast(1.0f) - t * t) * (a * exp(broadcast(cap) * t - shift) - s * w);
}

// Stores what load_pair<T> loaded as elements of type G.
template <class T, class G>
FASTATTN_INLINE void store_pair_of(G* p, Pair x) {
  if constexpr (std::is_same_v<T, G>) {
    store_pair(p, x);
  } else {
    store(p, x.a);
    store(p + kLanes, x.b);
  }
}

// Writes a row's gradient but for the target's own term. dx may be x, also where G is shorter than
// T and it takes the first half of x's memory; past_caches only where G is T.
template <bool kRich, class T, class G>
FASTATTN_INLINE void write_gradient(const T* x, const CrossEntropyParams& p, float row_max,
                                    float a_, float s_, bool past_caches, G* dx) {
  const Vec shift = broadcast(row_max), a = broadcast(a_), s = broadcast(s_), one = broadcast(1.0f);
  const auto write_until = [&](int64_t i, int64_t end) {
    for (; i < end; i += kLanes) {
      const Mask lanes = first_lanes(end - i);
      const Vec w = kRich && p.weight ? load_partial(p.weight + i, lanes) : one;
      const Vec g = gradient<kRich>(load_partial(x + i, lanes), w, p.softcap, shift, a, s);
      store_partial(dx + i, g, lanes);
    }
  };

  int64_t i = 0;
  if constexpr (!kRich) {
    const auto pair_at = [&](int64_t at) -> Pair {
      const Pair z = load_pair(x + at);
      return {a * exp(z.a - shift), a * exp(z.b - shift)};
    };
    if (past_caches) {
      const uintptr_t beyond_line = reinterpret_cast<uintptr_t>(dx) % 64;
      if (beyond_line) i = std::min<int64_t>(p.vocab, (64 - beyond_line) / sizeof(G));
      write_until(0, i);
      for (; i + 2 * kLanes <= p.vocab; i += 2 * kLanes) stream_pair(dx + i, pair_at(i));
    } else {
      for (; i + 2 * kLanes <= p.vocab; i += 2 * kLanes) store_pair_of<T>(dx + i, pair_at(i));
    }
  }
  write_until(i, p.vocab);
}

// Loss and lse of row r where p.loss is set, its gradient where p.dlogits is.
template <bool kRich, class T, class G>
void one_row(const CrossEntropyParams& p, int64_t r, bool past_caches) {
  const T* x = static_cast<const T*>(p.logits) + r * p.logits_stride;
  G* dx = p.dlogits ? static_cast<G*>(p.dlogits) + r * p.dlogits_stride : nullptr;
  const int64_t target = p.target[r];
  const bool ignored = target == p.ignore_index;
  const float dlse = p.dlse ? p.dlse[r] : 0.0f;
  if (ignored && dlse == 0 && !p.loss) {
    std::fill_n(dx, p.vocab, G{});
    return;
  }

  const RowStats row =
      kRich || p.loss ? row_stats<kRich>(x, p) : row_stats_from_lse(x, p.vocab, p.lse[r]);
  const float log_sum = std::log(row.sum), lse = row.max + log_sum;
  float nll = 0, weight = 0, slope = 1;  // of the target; slope = dz/dx
  if (!ignored) {
    float z = to_float(x[target]);
    if (kRich && p.softcap > 0) {
      const float t = max(tanh(broadcast(z * (1 / p.softcap))));
      z = p.softcap * t;
      slope = 1 - t * t;
    }
    nll = log_sum - (z - row.max);
    weight = p.weight ? p.weight[target] : 1.0f;
  }
  const float hard = (1 - p.label_smoothing) * weight, soft = p.label_smoothing / float(p.vocab);
  if (p.loss) {
    float loss = hard * nll;
    if (kRich && p.label_smoothing > 0) loss += soft * (row.weight * log_sum - row.smooth);
    if (p.z_loss != 0) loss += p.z_loss * lse * lse;
    p.loss[r] = ignored ? 0.0f : loss;
    p.lse[r] = lse;
  }
  if (!dx) return;
  if (ignored && dlse == 0) {
    std::fill_n(dx, p.vocab, G{});
    return;
  }

  const float g = ignored ? 0.0f : p.dloss[r * p.dloss_stride];
  const float t = g * hard, s = g * soft;
  const float u = (p.z_loss != 0 ? 2 * g * p.z_loss * lse : 0.0f) + dlse;
  write_gradient<kRich>(x, p, row.max, (t + s * row.weight + u) / row.sum, s, past_caches, dx);
  if (!ignored) {
    // In terms that don't cancel where p_y is near 1: p_y − 1 = exp(−nll) − 1.
    const float p_y = std::exp(-nll);
    const float smooth = kRich ? s * (row.weight * p_y - weight) : 0.0f;
    from_float(slope * (t * std::expm1(-nll) + smooth + u * p_y), dx + target);
  }
}

template <bool kRich, class T, class G>
void all_rows(const CrossEntropyParams& p, const Pool& pool) {
  const int64_t bytes = p.rows * p.vocab * int64_t(sizeof(T));
  const bool past_caches =
      std::is_same_v<T, G> && p.dlogits && p.dlogits != p.logits && bytes >= kStreamBytes;
  if (past_caches && p.dlogits_stride == p.vocab) advise_huge_pages(p.dlogits, bytes);
  const int64_t task_rows = std::max<int64_t>(1, kTaskLogits / std::max<int64_t>(1, p.vocab));
  pool.run((p.rows + task_rows - 1) / task_rows, [&](int64_t task) {
    [[maybe_unused]] const FlushDenormals guard;
    const int64_t end = std::min(p.rows, (task + 1) * task_rows);
    for (int64_t r = task * task_rows; r < end; r++) one_row<kRich, T, G>(p, r, past_caches);
    if (past_caches) stream_fence();
  });
}

inline void run(const CrossEntropyParams& p, const Pool& pool) {
  const bool rich = p.softcap > 0 || p.label_smoothing > 0;
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, float>) {
      if (p.dlogits && p.dlogits_dtype == DType::kBF16) {
        return rich ? all_rows<true, T, bf16>(p, pool) : all_rows<false, T, bf16>(p, pool);
      }
    }
    rich ? all_rows<true, T, T>(p, pool) : all_rows<false, T, T>(p, pool);
  });
}

}  // namespace cross_entropy

static void cross_entropy_fwd(const CrossEntropyParams& p, const Pool& pool) {
  cross_entropy::run(p, pool);
}
static void cross_entropy_bwd(const CrossEntropyParams& p, const Pool& pool) {
  cross_entropy::run(p, pool);  // p.loss is null: only the gradient is written
}
