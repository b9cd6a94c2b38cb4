// Blocks of keys, and how a tile of queries meets one: the part forward and backward share.

template <class T>
static T* head_at(const void* tensor, const Strides& stride, int64_t batch, int64_t row,
                  int64_t head) {
  return static_cast<T*>(const_cast<void*>(tensor)) + batch * stride.batch + row * stride.seq +
         head * stride.head;
}

// Some keys and values of a KV head as operands.
template <class E>
struct KeyBlock {
  Range keys;
  Rows<E> k, v;
};

// How a kernel walks a block of K or V: by rows, or by columns too, which pairs need across, and
// for which fp32 rows that are far apart are better copied together: it would touch a page for
// each.
enum class Walk { kRows, kColumns };

// K or V of a KV head, some keys at a time, as operands: copied into scratch, or where they lie.
template <class T>
class KeyRows {
 public:
  using E = Operand<T>;

  KeyRows(const T* source, int64_t stride, int64_t cols, Walk walk, Scratch& scratch)
      : source_(source), stride_(stride), cols_(cols) {
    constexpr int64_t kFar = 256;  // floats: a block then spans 16 pages
    const int64_t ld = padded(cols);
    if constexpr (kPairs<E>) {
      const bool in_place = cols % 2 == 0 && stride % 2 == 0;
      if (!in_place) copy_ = take<E>(scratch, kBlockK * ld / 2);
      if (walk == Walk::kColumns) across_ = take<E>(scratch, kBlockK / 2 * ld);
    } else {
      const bool in_place =
          std::is_same_v<T, float> && (walk == Walk::kRows || std::abs(stride) <= kFar);
      if (!in_place) copy_ = take<E>(scratch, kBlockK * ld);
    }
  }

  Rows<E> load(Range keys) const {
    const T* source = source_ + keys.begin * stride_;
    const int64_t ld = padded(cols_);
    if constexpr (kPairs<E>) {
      if (across_) interleave_rows(source, stride_, keys.size(), cols_, across_, ld);
      if (copy_ == nullptr) {
        return {reinterpret_cast<const E*>(source), stride_ / 2, across_, ld};
      }
      round_rows(source, stride_, keys.size(), cols_, &copy_->first, ld);
      return {copy_, ld / 2, across_, ld};
    } else {
      if constexpr (std::is_same_v<T, float>) {
        if (copy_ == nullptr) return {source, stride_, source, stride_};
      }
      load_rows(source, stride_, keys.size(), cols_, copy_);
      return {copy_, ld, copy_, ld};
    }
  }

  void prefetch(Range keys) const {
    prefetch_rows(source_ + keys.begin * stride_, stride_, keys.size(), cols_);
  }

 private:
  const T* source_;
  int64_t stride_, cols_;
  E *copy_ = nullptr, *across_ = nullptr;  // of kBlockK keys, rows padded(cols) wide
};

// The blocks of a KV head, kBlockK keys at a time.
template <class T>
class KeyBlocks {
 public:
  KeyBlocks(const AttnFwdParams& p, const Sequence& s, int64_t head_k, Walk walk_k, Walk walk_v,
            Scratch& scratch)
      : k_(head_at<const T>(p.k, p.k_stride, s.batch, s.k_row, head_k), p.k_stride.seq, p.head_dim,
           walk_k, scratch),
        v_(head_at<const T>(p.v, p.v_stride, s.batch, s.k_row, head_k), p.v_stride.seq,
           p.head_dim_v, walk_v, scratch) {}

  KeyBlock<Operand<T>> load(Range keys) const { return {keys, k_.load(keys), v_.load(keys)}; }

  // Has these keys on their way while the block before them is computed on: their rows are too far
  // apart for the processor to see what comes next.
  void prefetch(Range keys) const {
    k_.prefetch(keys);
    v_.prefetch(keys);
  }

 private:
  KeyRows<T> k_, v_;
};

// Calls body(range) for each block with keys that a query of `queries` sees. Blocks start at
// multiples of kBlockK, so that a row's result does not depend on how rows are shared among tasks.
template <class Body>
FASTATTN_INLINE void for_each_block(const Window& window, Range queries, const Body& body) {
  const Range keys = keys_seen_by_any(window, queries);
  for (int64_t n = keys.begin / kBlockK * kBlockK; n < keys.end; n += kBlockK) {
    body(intersect({n, n + kBlockK}, keys));
  }
}

// The part of the block behind `block` that is to be prefetched in step `step` of `steps`.
static Range next_slice(const Window& window, Range queries, Range block, int step, int steps) {
  const Range next = intersect({block.end, block.end + kBlockK}, keys_seen_by_any(window, queries));
  if (next.empty()) return {0, 0};
  const int64_t size = ceil_div(next.size(), steps);
  return intersect({next.begin + step * size, next.begin + (step + 1) * size}, next);
}

// Calls body(V, lanes, keys, scores) for each segment of a block that a tile sees: the queries
// `lanes` in V vectors, and the policy that makes their scores. `mods` is null for plain problems.
template <class Body>
FASTATTN_INLINE void for_each_segment(const Window& window, Range queries, Range block,
                                      const ScoreMods* mods, const Body& body) {
  Range rest = intersect(block, keys_seen_by_any(window, queries));
  while (!rest.empty()) {
    const Segment segment = next_segment(window, queries, kLanes, rest);
    rest.begin = segment.keys.end;
    const Range lanes = intersect(
        {queries.begin + segment.vec_begin * kLanes, queries.begin + segment.vec_end * kLanes},
        queries);
    with_vecs(segment.vec_end - segment.vec_begin, [&](auto V) {
      if (mods) {
        body(V, lanes, segment.keys, mods->prepare(lanes, segment.keys, segment.edge));
      } else if (segment.edge) {
        body(V, lanes, segment.keys, EdgeScores(window, lanes.begin, segment.keys.begin));
      } else {
        body(V, lanes, segment.keys, PlainScores{});
      }
    });
  }
}

// C (cols, kTileQ) += Aᵀ·B, A (keys, cols) and B (keys, kTileQ), over visible pairs alone. Where A
// holds NaN or infinity, its product with the 0 of a hidden pair must not reach C. Slow, for such
// blocks only.
template <int V, class T, class Scores>
static void multiply_add_visible(int64_t cols, int64_t keys, const T* a, int64_t stride,
                                 const float* b, float* c, const Scores& scores) {
  for (int64_t n = 0; n < keys; n++) {
    for (int v = 0; v < V; v++) {
      const Vec right = load(b + n * kTileQ + v * kLanes);
      for (int64_t r = 0; r < cols; r++) {
        float* sum = c + r * kTileQ + v * kLanes;
        const Vec product = broadcast(to_float(a[n * stride + r])) * right;
        store(sum, load(sum) + scores.visible(n, v, product));
      }
    }
  }
}

// The same for C (keys, cols) += B (keys, lanes) · A (lanes, cols), A across.
template <int V, class E, class Scores>
static void multiply_add_seen(int64_t keys, int64_t lanes, int64_t cols, const float* b, const E* a,
                              float* c, const Scores& scores) {
  float seen[V * kLanes];
  for (int64_t n = 0; n < keys; n++, b += kTileQ, c += cols) {
    for (int v = 0; v < V; v++) store(seen + v * kLanes, scores.visible(n, v, broadcast(1.0f)));
    for (int64_t m = 0; m < lanes; m++) {
      if (seen[m] == 0) continue;
      for (int64_t col = 0; col < cols; col++) c[col] += b[m] * value_across(a, cols, m, col);
    }
  }
}
