// Between K·Qᵀ and the softmax: window edges, softcap, bias, ALiBi, mask and dropout.
//
// A kernel sees them as one of three policies, asked per key row n and vector v of a tile:
//   score(n, v, raw)   the score of the raw product, −inf where hidden
//   visible(n, v, x)   x, or 0 where hidden, NaN or not
//   keep(n, v, x)      x after dropout
//   backward(n, v, raw, dscore)   the gradient of scale · q · k from the score's

// Every query sees every key.
struct PlainScores {
  static constexpr bool kHides = false;
  FASTATTN_INLINE Vec score(int64_t, int, Vec raw) const { return raw; }
  FASTATTN_INLINE Vec visible(int64_t, int, Vec x) const { return x; }
  FASTATTN_INLINE Vec keep(int64_t, int, Vec x) const { return x; }
  FASTATTN_INLINE Vec backward(int64_t, int, Vec, Vec dscore) const { return dscore; }
};

// The window's edge passes through: lanes [first + n, last + n) see key row n.
struct EdgeScores : PlainScores {
  static constexpr bool kHides = true;
  int64_t first, last;

  EdgeScores(const Window& w, int64_t query, int64_t key)  // of lane 0 and row 0
      : first(key - w.right - w.diagonal - query), last(key + w.left - w.diagonal - query + 1) {}

  FASTATTN_INLINE Vec choose(int64_t n, int v, Vec yes, Vec no) const {
    const Vec before_last = select(first_lanes(last + n - v * kLanes), yes, no);
    return select(first_lanes(first + n - v * kLanes), no, before_last);
  }
  FASTATTN_INLINE Vec score(int64_t n, int v, Vec raw) const {
    return choose(n, v, raw, broadcast(-INFINITY));
  }
  FASTATTN_INLINE Vec visible(int64_t n, int v, Vec x) const { return choose(n, v, x, zero()); }
};

// Everything, by run-time values.
struct RichScores {
  static constexpr bool kHides = true;
  float softcap;       // raw is then scale · q · k / softcap. 0 = none
  const float* added;  // (keys, kTileQ): bias and ALiBi, −inf where hidden. Null = none
  const float* kept;   // (keys, kTileQ): dropout's factors. Null = none
  float*
      dscores;  // (keys, kTileQ): backward() leaves the scores' gradients here. Null = not wanted

  FASTATTN_INLINE Vec score(int64_t n, int v, Vec raw) const {
    const Vec x = softcap > 0 ? broadcast(softcap) * tanh(raw) : raw;
    if (added == nullptr) return x;
    const Vec a = load(added + n * kTileQ + v * kLanes);
    return select(equal(a, broadcast(-INFINITY)), a, x + a);
  }
  FASTATTN_INLINE Vec visible(int64_t n, int v, Vec x) const {
    if (added == nullptr) return x;
    const Vec a = load(added + n * kTileQ + v * kLanes);
    return select(equal(a, broadcast(-INFINITY)), zero(), x);
  }
  FASTATTN_INLINE Vec keep(int64_t n, int v, Vec x) const {
    return kept == nullptr ? x : x * load(kept + n * kTileQ + v * kLanes);
  }
  FASTATTN_INLINE Vec backward(int64_t n, int v, Vec raw, Vec dscore) const {
    if (dscores) store(dscores + n * kTileQ + v * kLanes, dscore);
    if (!(softcap > 0)) return dscore;
    const Vec t = tanh(raw);
    return dscore * (broadcast(1.0f) - t * t);
  }
};

static bool is_rich(const AttnFwdParams& p) {
  return p.softcap > 0 || p.mask || p.bias || p.alibi_slopes || p.seed;
}

// What Q is multiplied by, so that raw products are what score() takes.
static float query_factor(const AttnFwdParams& p) {
  return p.softcap > 0 ? p.scale / p.softcap : p.scale;
}

// Where a bias wants its gradient; null = nowhere.
struct BiasGradient {
  float* data;
  ScoreStrides stride;
};

// Makes the tiles RichScores reads, for one head of one sequence at a time.
class ScoreMods {
 public:
  ScoreMods(const AttnFwdParams& p, const Sequence& sequence, const Window& window,
            Scratch& scratch, BiasGradient dbias = {})
      : p_(p),
        sequence_(sequence),
        window_(window),
        dbias_(dbias),
        rows_(scratch.take(kTileQ * kBlockK)),
        bias_row_(scratch.take(kBlockK)),
        added_(scratch.take(kBlockK * kTileQ)),
        kept_(scratch.take(kBlockK * kTileQ)),
        dscores_(scratch.take(kBlockK * kTileQ)) {}

  void set_head(int64_t head) { head_ = head; }

  RichScores prepare(Range queries, Range keys, bool edge) const {
    const bool adds = p_.bias || p_.mask || p_.alibi_slopes || edge;
    if (adds) pack_added(queries, keys, edge);
    if (p_.seed) pack_kept(queries, keys);
    return {p_.softcap, adds ? added_ : nullptr, p_.seed ? kept_ : nullptr,
            dbias_.data ? dscores_ : nullptr};
  }

  // Adds what backward() has left for these queries and keys.
  void add_dbias(Range queries, Range keys) const {
    if (dbias_.data == nullptr) return;
    float ones[kTileQ];
    std::fill_n(ones, kTileQ, 1.0f);
    unpack_transposed(dscores_, ones, queries.size(), keys.size(), rows_, kBlockK);
    for (int64_t i = queries.begin; i < queries.end; i++) {
      const float* row = rows_ + (i - queries.begin) * kBlockK;
      float* dbias = dbias_.data + offset(dbias_.stride, i, keys.begin);
      if (dbias_.stride.col == 1) {
        for (int64_t n = 0; n < keys.size(); n++) dbias[n] += row[n];
      } else {
        for (int64_t n = 0; n < keys.size(); n++) dbias[n * dbias_.stride.col] += row[n];
      }
    }
  }

 private:
  void pack_added(Range queries, Range keys, bool edge) const {
    for (int64_t i = queries.begin; i < queries.end; i++) {
      float* row = rows_ + (i - queries.begin) * kBlockK;
      std::fill_n(row, keys.size(), 0.0f);
      if (p_.alibi_slopes) add_alibi(i, keys, row);
      if (p_.bias) add_bias(i, keys, row);
      if (p_.mask) hide_masked(i, keys, row);
      if (edge) {
        const Range seen = intersect(keys, keys_seen_by_any(window_, {i, i + 1}));
        for (int64_t j = keys.begin; j < keys.end; j++) {
          if (j < seen.begin || j >= seen.end) row[j - keys.begin] = -INFINITY;
        }
      }
    }
    pack_transposed(rows_, kBlockK, queries.size(), keys.size(), 1.0f, added_);
  }

  void add_alibi(int64_t i, Range keys, float* row) const {
    const float slope = p_.alibi_slopes[sequence_.batch * p_.alibi_stride_batch + head_];
    const int32_t distance = int32_t(i + window_.diagonal - keys.begin);
    for (int32_t n = 0; n < int32_t(keys.size()); n++)
      row[n] -= slope * float(std::abs(distance - n));
  }

  void add_bias(int64_t i, Range keys, float* row) const {
    const ScoreStrides& stride = p_.bias_stride;
    with_dtype(p_.bias_dtype, [&](auto type) {
      const auto* bias =
          static_cast<const decltype(type)*>(p_.bias) + offset(stride, i, keys.begin);
      if (stride.col == 1) {
        load_rows(bias, 0, 1, keys.size(), bias_row_);
      } else {
        for (int64_t n = 0; n < keys.size(); n++) bias_row_[n] = to_float(bias[n * stride.col]);
      }
    });
    for (int64_t n = 0; n < keys.size(); n++) row[n] += bias_row_[n];
  }

  void hide_masked(int64_t i, Range keys, float* row) const {
    const uint8_t* mask = p_.mask + offset(p_.mask_stride, i, keys.begin);
    for (int64_t n = 0; n < keys.size(); n++) {
      if (!mask[n * p_.mask_stride.col]) row[n] = -INFINITY;
    }
  }

  void pack_kept(Range queries, Range keys) const {
    uint32_t words[4][kPhiloxLanes];
    for (int64_t quad = keys.begin / 4; 4 * quad < keys.end; quad++) {
      for (int64_t lane = 0; lane < queries.size(); lane += kPhiloxLanes) {
        philox(uint32_t(quad), uint32_t(queries.begin + lane), uint32_t(head_),
               uint32_t(sequence_.batch), uint64_t(*p_.seed), words);
        const int lanes = int(std::min<int64_t>(kPhiloxLanes, kTileQ - lane));
        for (int64_t word = 0; word < 4; word++) {
          const int64_t n = 4 * quad + word - keys.begin;
          if (n < 0 || n >= keys.size()) continue;
          float* row = kept_ + n * kTileQ + lane;
          for (int l = 0; l < lanes; l++) {
            row[l] = words[word][l] >= p_.dropout_threshold ? p_.dropout_scale : 0.0f;
          }
        }
      }
    }
  }

  int64_t offset(const ScoreStrides& stride, int64_t i, int64_t j) const {
    return sequence_.batch * stride.batch + head_ * stride.head + i * stride.row + j * stride.col;
  }

  const AttnFwdParams& p_;
  const Sequence& sequence_;
  const Window& window_;
  const BiasGradient dbias_;
  int64_t head_ = 0;
  float *rows_, *bias_row_;          // (kTileQ, kBlockK); (kBlockK)
  float *added_, *kept_, *dscores_;  // (kBlockK, kTileQ)
};
