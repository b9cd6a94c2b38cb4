// Gradients of attention. P = exp(S − lse) is recomputed tile by tile, and with dP = dO·Vᵀ,
// delta = rowsum(dO∘O) − dlse (Dao et al., "FlashAttention", 2022, appendix B.4):
//   dS = P∘(dP − delta)    dV = Pᵀ·dO    dK = scale · dSᵀ·Q    dQ = scale · dS·K
//
// A task owns a KV head of a sequence: for the query heads of its group it goes over tiles of
// queries, and under each over blocks of keys. A tile's dQ stays in scratch until it is whole; dK
// and dV of the whole head accumulate in fp32. Where that makes too few tasks, a head's queries are
// shared among several, each with a dK and dV of its own, which are added up at the end. Nothing is
// ever added by two threads, so results are the same bit for bit each time with the same number of
// threads.

constexpr int kBwdTiles = 128 / kTileQ;  // a unit of queries that share a pass over the keys
constexpr int64_t kUnitQueries = kBwdTiles * kTileQ;

template <class E>
struct BwdTile {
  Range queries;
  E *q, *dout;            // (elements of D or D_v, kTileQ): transposed, as dq
  float* dq;              // (D, kTileQ)
  E *q_rows, *dout_rows;  // (kTileQ, padded(D or D_v)), across
  float *lse, *delta;     // (kTileQ)
  bool finite;            // all of q and dout
};

// dK and dV of one KV head in fp32, not yet scaled: (S_k, padded(D)), (S_k, padded(D_v)).
struct KeyGradients {
  float *dk, *dv;
};

template <class E>
struct BwdScratch {
  float *probs, *dprobs;  // (kBlockK, kTileQ)
  ScoreOperand<E> operand;

  explicit BwdScratch(Scratch& scratch)
      : probs(scratch.take(kBlockK * kTileQ)),
        dprobs(scratch.take(kBlockK * kTileQ)),
        operand(scratch) {}
};

// What some keys of a block and some queries of a tile, in V vectors, give each other.
template <int V, class E, class Scores>
static void backprop(const AttnFwdParams& p, const BwdTile<E>& tile, Range queries,
                     const KeyBlock<E>& block, Range keys, const KeyGradients& grads,
                     BwdScratch<E>& scratch, const Scores& scores) {
  const int64_t count = keys.size(), lane0 = queries.begin - tile.queries.begin;
  const int64_t first = keys.begin - block.keys.begin;
  float *probs = scratch.probs, *dprobs = scratch.dprobs;
  multiply<V>(count, elements<E>(p.head_dim), block.k.rows(first), tile.q + lane0, kTileQ, probs,
              kTileQ, factor_left<E>(query_factor(p)));
  multiply<V>(count, elements<E>(p.head_dim_v), block.v.rows(first), tile.dout + lane0, kTileQ,
              dprobs, kTileQ, Set{});

  Vec lse[V], delta[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    lse[v] = load(tile.lse + lane0 + v * kLanes);
    delta[v] = load(tile.delta + lane0 + v * kLanes);
  }
  for (int64_t n = 0; n < count; n++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float *prob = probs + n * kTileQ + v * kLanes, *dprob = dprobs + n * kTileQ + v * kLanes;
      const Vec raw = load(prob);
      const Vec weight = scores.visible(n, v, exp(scores.score(n, v, raw) - lse[v]));
      const Vec dscore = scores.visible(n, v, weight * (scores.keep(n, v, load(dprob)) - delta[v]));
      store(prob, scores.keep(n, v, weight));
      store(dprob, scores.backward(n, v, raw, dscore));
    }
  }

  const int64_t ld_k = padded(p.head_dim), ld_v = padded(p.head_dim_v);
  const E* q_rows = tile.q_rows + elements<E>(lane0) * ld_k;
  const E* dout_rows = tile.dout_rows + elements<E>(lane0) * ld_v;
  float *dk = grads.dk + keys.begin * ld_k, *dv = grads.dv + keys.begin * ld_v;
  const auto* k = block.k.values(first);
  const int64_t stride = block.k.values_stride();
  const bool clean =
      (!Scores::kHides || (tile.finite && all_finite(k, stride, count, p.head_dim))) &&
      partners_finite(block.k, first, count, block.keys.size(), p.head_dim);
  if (!clean) {
    multiply_add_seen<V>(count, queries.size(), ld_v, probs, dout_rows, dv, scores);
    multiply_add_seen<V>(count, queries.size(), ld_k, dprobs, q_rows, dk, scores);
    multiply_add_visible<V>(p.head_dim, count, k, stride, dprobs, tile.dq + lane0, scores);
    return;
  }
  const int64_t lanes = queries.size(), depth = elements<E>(lanes);
  ScoreOperand<E>& operand = scratch.operand;
  operand.template pack_along<V>(probs, count, lanes);
  multiply_add(count, depth, ld_v, {operand.along, operand.kStride, 1}, dout_rows, dv);
  operand.template pack_along<V>(dprobs, count, lanes);
  multiply_add(count, depth, ld_k, {operand.along, operand.kStride, 1}, q_rows, dk);
  operand.template pack_across<V>(dprobs, count, first);
  multiply<V>(p.head_dim, operand.depth(count, first), block.k.columns(first), operand.across,
              kTileQ, tile.dq + lane0, kTileQ, Add{});
}

// Fills a tile from q, out, dout, lse and dlse. Returns its part of the sink's gradient, whose
// probability is exp(sink − lse) and which has no value: −P·delta.
template <class T>
static double load_tile(const AttnBwdParams& b, const Sequence& s, int64_t head,
                        BwdTile<Operand<T>>& tile) {
  const AttnFwdParams& p = b.fwd;
  const int64_t row = s.q_row + tile.queries.begin, size = tile.queries.size();
  const T* q = head_at<const T>(p.q, p.q_stride, s.batch, row, head);
  const T* out = head_at<const T>(p.out, p.out_stride, s.batch, row, head);
  const T* dout = head_at<const T>(b.dout, b.dout_stride, s.batch, row, head);
  const float* lse = p.lse + s.batch * p.lse_stride_batch + head * p.lse_stride_head + row;
  const float* dlse =
      b.dlse ? b.dlse + s.batch * b.dlse_stride_batch + head * b.dlse_stride_head + row : nullptr;

  tile.finite = all_finite(q, p.q_stride.seq, size, p.head_dim) &&
                all_finite(dout, b.dout_stride.seq, size, p.head_dim_v);
  pack_rows(q, p.q_stride.seq, size, p.head_dim, tile.q_rows);
  pack_rows(dout, b.dout_stride.seq, size, p.head_dim_v, tile.dout_rows);
  pack_queries(q, p.q_stride.seq, size, p.head_dim, query_factor(p), tile.q);
  pack_queries(dout, b.dout_stride.seq, size, p.head_dim_v, 1.0f, tile.dout);
  std::fill_n(tile.dq, p.head_dim * kTileQ, 0.0f);

  double dsink = 0;
  for (int64_t i = 0; i < size; i++) {
    Vec product = zero();
    for (int64_t d = 0; d < p.head_dim_v; d += kLanes) {
      product = fmadd(load_upto(out + i * p.out_stride.seq + d, p.head_dim_v - d),
                      load_upto(dout + i * b.dout_stride.seq + d, p.head_dim_v - d), product);
    }
    // A row that saw nothing gets P = 0 from lse = inf, as its scores may all be −inf.
    const bool empty = lse[i] == -INFINITY;
    tile.lse[i] = empty ? INFINITY : lse[i];
    tile.delta[i] = sum(product) - (dlse ? dlse[i] : 0);
    if (b.dsinks && !empty) dsink -= std::exp(double(p.sinks[head]) - lse[i]) * tile.delta[i];
  }
  std::fill_n(tile.lse + size, kTileQ - size, INFINITY);
  std::fill_n(tile.delta + size, kTileQ - size, 0.0f);
  return dsink;
}

// The queries of a head in units of kUnitQueries, dealt to `count` shares back and forth, so that
// under a causal mask all get about the same work.
struct Share {
  int64_t index, count;
  bool owns(int64_t unit) const {
    const int64_t place = unit % count;
    return index == (unit / count % 2 == 0 ? place : count - 1 - place);
  }
};

// One share of a KV head: dQ and dbias of its queries are written, dK and dV added to `grads`.
// dsinks is (H_q, units) of this sequence, or null.
template <class T>
static void backprop_share(const AttnBwdParams& b, const Sequence& s, int64_t head_k, Share share,
                           const KeyGradients& grads, double* dsinks, Scratch& scratch) {
  const AttnFwdParams& p = b.fwd;
  const Window window = make_window(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right);
  const int64_t group_size = p.heads_q / p.heads_k;
  const int64_t units = ceil_div(p.seqlen_q, kUnitQueries);
  const int64_t ld_k = padded(p.head_dim), ld_v = padded(p.head_dim_v);
  const KeyBlocks<T> blocks(p, s, head_k, Walk::kColumns, Walk::kRows, scratch);
  std::fill_n(grads.dk, s.seqlen_k * ld_k, 0.0f);
  std::fill_n(grads.dv, s.seqlen_k * ld_v, 0.0f);
  using E = Operand<T>;
  BwdScratch<E> tile_scratch(scratch);
  float factors[kTileQ];
  std::fill_n(factors, kTileQ, p.scale);
  ScoreMods mods(p, s, window, scratch, {b.dbias, b.dbias_stride});
  BwdTile<E> tiles[kBwdTiles];
  for (BwdTile<E>& tile : tiles) {
    tile.q = take<E>(scratch, ld_k * kTileQ);
    tile.dq = scratch.take(ld_k * kTileQ);
    tile.dout = take<E>(scratch, ld_v * kTileQ);
    tile.q_rows = take<E>(scratch, ld_k * kTileQ);
    tile.dout_rows = take<E>(scratch, ld_v * kTileQ);
    tile.lse = scratch.take(kTileQ);
    tile.delta = scratch.take(kTileQ);
  }

  for (int64_t head = head_k * group_size; head < (head_k + 1) * group_size; head++) {
    mods.set_head(head);
    for (int64_t unit = 0; unit * kUnitQueries < s.seqlen_q; unit++) {
      if (!share.owns(unit)) continue;
      const Range queries =
          intersect({0, s.seqlen_q}, {unit * kUnitQueries, (unit + 1) * kUnitQueries});
      int count = 0;
      double dsink = 0;
      for (int64_t i = queries.begin; i < queries.end; i += kTileQ) {
        BwdTile<E>& tile = tiles[count++];
        tile.queries = {i, std::min(i + kTileQ, queries.end)};
        dsink += load_tile<T>(b, s, head, tile);
      }
      if (dsinks) dsinks[head * units + unit] = dsink;

      for_each_block(window, queries, [&](Range keys) {
        const KeyBlock<E> block = blocks.load(keys);
        for (int t = 0; t < count; t++) {
          blocks.prefetch(next_slice(window, queries, keys, t, count));
          for_each_segment(window, tiles[t].queries, keys, is_rich(p) ? &mods : nullptr,
                           [&](auto V, Range lanes, Range segment, const auto& scores) {
                             backprop<V>(p, tiles[t], lanes, block, segment, grads, tile_scratch,
                                         scores);
                             mods.add_dbias(lanes, segment);
                           });
        }
      });
      for (int t = 0; t < count; t++) {
        const Range tile = tiles[t].queries;
        unpack_transposed(tiles[t].dq, factors, tile.size(), p.head_dim,
                          head_at<T>(b.dq, b.dq_stride, s.batch, s.q_row + tile.begin, head),
                          b.dq_stride.seq);
      }
    }
  }
}

// dst = factor · (the sum of `shares` accumulators, `apart` floats from one to the next).
template <class T>
static void write_gradient(const float* sums, int64_t shares, int64_t apart, int64_t rows,
                           int64_t cols, float factor, T* dst, int64_t stride) {
  const int64_t ld = padded(cols);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      Vec sum = load(sums + r * ld + c);
      for (int64_t share = 1; share < shares; share++) {
        sum = sum + load(sums + share * apart + r * ld + c);
      }
      store_upto(dst + r * stride + c, sum * broadcast(factor), cols - c);
    }
  }
}

// How many shares to cut each head into: the fewest that bring the time within 10 % of the best.
static int64_t choose_shares(int64_t heads, int64_t units, int64_t threads) {
  const auto time = [&](int64_t shares) {
    return ceil_div(heads * shares, threads) * ceil_div(units, shares);
  };
  int64_t best = 1;
  for (int64_t shares = 2; shares <= std::min(units, threads); shares++) {
    if (10 * time(shares) < 9 * time(best)) best = shares;
  }
  return best;
}

static void attn_bwd(const AttnBwdParams& b, const Pool& pool) {
  const AttnFwdParams& p = b.fwd;
  if (p.batch == 0) return;
  const int64_t units = ceil_div(p.seqlen_q, kUnitQueries);

  // Tasks that add to the same elements of dbias come one after the other: a wave holds only those
  // that don't.
  const bool one_batch = b.dbias && b.dbias_stride.batch == 0;
  const bool one_head = b.dbias && b.dbias_stride.head == 0;
  const bool one_row = b.dbias && b.dbias_stride.row == 0;
  const int64_t wave_batch = one_batch ? 1 : p.batch, wave_heads = one_head ? 1 : p.heads_k;
  const int64_t shares =
      one_row ? 1 : choose_shares(wave_batch * wave_heads, units, pool.threads());

  // One share keeps dK and dV in its scratch and writes them; several meet in `partial`, (shares,
  // H_k, tokens, ld_k + ld_v).
  const int64_t ld_k = padded(p.head_dim), ld_v = padded(p.head_dim_v);
  const int64_t tokens = p.cu_seqlens_k ? p.cu_seqlens_k[p.batch] : p.batch * p.seqlen_k;
  const int64_t share_floats = p.heads_k * tokens * (ld_k + ld_v);
  const Buffer partial(shares == 1 ? 0 : shares * share_floats);
  const auto partial_of = [&](const Sequence& s, int64_t head_k, int64_t share) -> KeyGradients {
    const int64_t first = p.cu_seqlens_k ? s.k_row : s.batch * p.seqlen_k;
    float* dk = partial.data() + share * share_floats + (head_k * tokens + first) * (ld_k + ld_v);
    return {dk, dk + s.seqlen_k * ld_k};
  };
  const auto write = [&](const Sequence& s, int64_t head_k, const KeyGradients& grads, Range keys) {
    with_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      const int64_t row = s.k_row + keys.begin;
      write_gradient(grads.dk + keys.begin * ld_k, shares, share_floats, keys.size(), p.head_dim,
                     p.scale, head_at<T>(b.dk, b.dk_stride, s.batch, row, head_k), b.dk_stride.seq);
      write_gradient(grads.dv + keys.begin * ld_v, shares, share_floats, keys.size(), p.head_dim_v,
                     1.0f, head_at<T>(b.dv, b.dv_stride, s.batch, row, head_k), b.dv_stride.seq);
    });
  };

  std::vector<double> dsinks(b.dsinks ? p.batch * p.heads_q * units : 0);
  for (int64_t wave = 0; wave < p.batch / wave_batch * (p.heads_k / wave_heads); wave++) {
    pool.run(wave_batch * wave_heads * shares, [&](int64_t index) {
      const FlushDenormals flush;
      const int64_t share = index % shares, batch_and_head = index / shares;
      const int64_t head_k = one_head ? wave % p.heads_k : batch_and_head % p.heads_k;
      const int64_t batch =
          one_batch ? wave / (p.heads_k / wave_heads) : batch_and_head / wave_heads;
      const Sequence s = sequence_at(p, batch);
      Scratch scratch;
      KeyGradients grads = partial_of(s, head_k, share);
      if (shares == 1) grads = {scratch.take(s.seqlen_k * ld_k), scratch.take(s.seqlen_k * ld_v)};
      double* sequence_dsinks = b.dsinks ? dsinks.data() + batch * p.heads_q * units : nullptr;
      with_dtype(p.dtype, [&](auto type) {
        backprop_share<decltype(type)>(b, s, head_k, {share, shares}, grads, sequence_dsinks,
                                       scratch);
      });
      if (shares == 1) write(s, head_k, grads, {0, s.seqlen_k});
    });
  }
  if (shares > 1) {
    constexpr int64_t kRowsPerTask = 256;
    const int64_t tasks = ceil_div(p.seqlen_k, kRowsPerTask);
    pool.run(p.batch * p.heads_k * tasks, [&](int64_t index) {
      const Sequence s = sequence_at(p, index / tasks / p.heads_k);
      const int64_t head_k = index / tasks % p.heads_k, begin = index % tasks * kRowsPerTask;
      write(s, head_k, partial_of(s, head_k, 0),
            intersect({begin, begin + kRowsPerTask}, {0, s.seqlen_k}));
    });
  }
  for (int64_t head = 0; b.dsinks && head < p.heads_q; head++) {
    double total = 0;
    for (int64_t batch = 0; batch < p.batch; batch++) {
      const double* parts = dsinks.data() + (batch * p.heads_q + head) * units;
      total = std::accumulate(parts, parts + units, total);
    }
    b.dsinks[head] = float(total);
  }
}
