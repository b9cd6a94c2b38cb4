// Blocks of keys, and how a tile of queries meets one: the part forward and backward share.

template <class T>
static T* head_at(const void* tensor, const Strides& stride, int64_t batch, int64_t row,
                  int64_t head) {
  return static_cast<T*>(const_cast<void*>(tensor)) + batch * stride.batch + row * stride.seq +
         head * stride.head;
}

// Some keys and values of a KV head as fp32 rows in scratch: the same to the arithmetic whatever
// dtype they came from.
struct KeyBlock {
  const float* k_row(int64_t key) const { return k + (key - keys.begin) * ld_k; }
  const float* v_row(int64_t key) const { return v + (key - keys.begin) * ld_v; }

  int64_t ld_k, ld_v;
  float *k, *v;
  Range keys{};
  bool k_finite = true, v_finite = true;
};

// The blocks of a KV head, kBlockK keys at a time, one loaded.
template <class T>
class KeyBlocks : public KeyBlock {
 public:
  KeyBlocks(const AttnFwdParams& p, const Sequence& s, int64_t head_k, Scratch& scratch)
      : p_(p),
        k_source_(head_at<const T>(p.k, p.k_stride, s.batch, s.k_row, head_k)),
        v_source_(head_at<const T>(p.v, p.v_stride, s.batch, s.k_row, head_k)) {
    ld_k = round_up(p.head_dim, kPad);
    ld_v = round_up(p.head_dim_v, kPad);
    k = scratch.take(kBlockK * ld_k);
    v = scratch.take(kBlockK * ld_v);
  }

  void load(Range block) {
    keys = block;
    const int64_t k_seq = p_.k_stride.seq, v_seq = p_.v_stride.seq, n = keys.begin;
    k_finite = load_rows(k_source_ + n * k_seq, k_seq, keys.size(), p_.head_dim, k, ld_k);
    v_finite = load_rows(v_source_ + n * v_seq, v_seq, keys.size(), p_.head_dim_v, v, ld_v);
  }

 private:
  const AttnFwdParams& p_;
  const T *k_source_, *v_source_;
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

// C (rows, kTileQ) += A·B (keys, kTileQ) over visible pairs alone. Where A holds NaN or infinity,
// its product with the 0 of a hidden pair must not reach C. Slow, for such blocks only.
template <int V, class Scores>
static void multiply_add_visible(int64_t rows, int64_t keys, Left a, const float* b, float* c,
                                 const Scores& scores) {
  for (int64_t n = 0; n < keys; n++) {
    for (int v = 0; v < V; v++) {
      const Vec right = load(b + n * kTileQ + v * kLanes);
      for (int64_t r = 0; r < rows; r++) {
        float* sum = c + r * kTileQ + v * kLanes;
        const Vec product = broadcast(a.at[r * a.row + n * a.depth]) * right;
        store(sum, load(sum) + scores.visible(n, v, product));
      }
    }
  }
}

// The same for C (keys, cols) += Bᵀ (keys, lanes) · A (lanes, cols), where A may be non-finite.
template <int V, class Scores>
static void multiply_add_seen(int64_t keys, int64_t lanes, int64_t cols, const float* b,
                              const float* a, float* c, const Scores& scores) {
  float seen[V * kLanes];
  for (int64_t n = 0; n < keys; n++) {
    for (int v = 0; v < V; v++) store(seen + v * kLanes, scores.visible(n, v, broadcast(1.0f)));
    for (int64_t m = 0; m < lanes; m++) {
      if (seen[m] == 0) continue;
      multiply_add(1, 1, cols, {b + n * kTileQ + m, 0, 0}, a + m * cols, c + n * cols);
    }
  }
}
