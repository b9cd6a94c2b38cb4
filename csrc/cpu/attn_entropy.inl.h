// How spread out each query's weights are, −Σ w · log w, from what attn_fwd has left: with
// w = exp(score − lse) that is Σ w · (lse − score). No value is read, and no maximum kept.

template <class E>
struct EntropyTile {
  Range queries;
  E* q;                 // (elements of D, kTileQ), transposed
  float *lse, *result;  // (kTileQ); an lse of +inf for a query that sees no key
};

// Some keys against some queries of a tile, in V vectors. products is (kBlockK, kTileQ) scratch.
template <int V, class E, class Scores>
static void add_entropy(const AttnFwdParams& p, const EntropyTile<E>& tile, Range queries,
                        const Rows<E>& k, Range keys, int64_t first, float* products,
                        const Scores& scores) {
  const int64_t lane0 = queries.begin - tile.queries.begin;
  multiply<V>(keys.size(), elements<E>(p.head_dim), k.rows(first), tile.q + lane0, kTileQ, products,
              kTileQ, factor_left<E>(query_factor(p)));
  Vec lse[V], sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    lse[v] = load(tile.lse + lane0 + v * kLanes);
    sum[v] = load(tile.result + lane0 + v * kLanes);
  }
  for (int64_t n = 0; n < keys.size(); n++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const Vec gap = lse[v] - scores.score(n, v, load(products + n * kTileQ + v * kLanes));
      const Vec weight = exp(zero() - gap);
      sum[v] = sum[v] + select(equal(weight, zero()), zero(), weight * gap);  // 0 · ∞ = 0
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) store(tile.result + lane0 + v * kLanes, sum[v]);
}

template <class T>
static void entropy_of_queries(const AttnEntropyParams& params, const Sequence& s, int64_t head,
                               Range queries) {
  using E = Operand<T>;
  const AttnFwdParams& p = params.fwd;
  const FlushDenormals flush;
  const Window window = make_window(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right);
  Scratch scratch;
  const int64_t head_k = head / (p.heads_q / p.heads_k);
  const KeyRows<T> keys_of_head(head_at<const T>(p.k, p.k_stride, s.batch, s.k_row, head_k),
                                p.k_stride.seq, p.head_dim, Walk::kRows, scratch);
  ScoreMods mods(p, s, window, scratch);
  mods.set_head(head);
  float* products = scratch.take(kBlockK * kTileQ);
  const T* q = head_at<const T>(p.q, p.q_stride, s.batch, s.q_row, head);
  const int64_t first_row = s.batch * p.lse_stride_batch + head * p.lse_stride_head + s.q_row;

  EntropyTile<E> tiles[kMaxTiles];
  int count = 0;
  for (int64_t i = queries.begin; i < queries.end; i += kTileQ) {
    EntropyTile<E>& tile = tiles[count++];
    tile = {{i, std::min(i + kTileQ, queries.end)},
            take<E>(scratch, padded(p.head_dim) * kTileQ),
            scratch.take(kTileQ),
            scratch.take(kTileQ)};
    pack_queries(q + i * p.q_stride.seq, p.q_stride.seq, tile.queries.size(), p.head_dim,
                 query_factor(p), tile.q);
    std::fill_n(tile.lse, kTileQ, INFINITY);
    std::fill_n(tile.result, kTileQ, 0.0f);
    for (int64_t r = 0; r < tile.queries.size(); r++) {
      const float lse = p.lse[first_row + i + r];
      if (lse != -INFINITY) tile.lse[r] = lse;
    }
  }

  for_each_block(window, queries, [&](Range block) {
    const Rows<E> k = keys_of_head.load(block);
    for (int t = 0; t < count; t++) {
      for_each_segment(window, tiles[t].queries, block, is_rich(p) ? &mods : nullptr,
                       [&](auto V, Range lanes, Range segment, const auto& scores) {
                         add_entropy<V>(p, tiles[t], lanes, k, segment, segment.begin - block.begin,
                                        products, scores);
                       });
    }
  });

  for (int t = 0; t < count; t++) {
    const Range rows = tiles[t].queries;
    std::copy_n(tiles[t].result, rows.size(), params.entropy + first_row + rows.begin);
  }
}

static void attn_entropy(const AttnEntropyParams& params, const Pool& pool) {
  for_each_task(params.fwd, params.fwd.head_dim, pool,
                [&](auto type, const Sequence& s, int64_t head, Range queries) {
                  entropy_of_queries<decltype(type)>(params, s, head, queries);
                });
}
