// softmax(scale·QKᵀ …)V, tile by tile with an online softmax (Dao et al., "FlashAttention", 2022).
//
// A task is some tiles of queries of one head; keys pass by in blocks of kBlockK, and each tile
// keeps Oᵀ (D_v, kTileQ) with the running maximum and sum of its queries. Blocks outside the window
// are skipped, and only segments on its edge are masked.

template <class E>
struct FwdTile {
  Range queries;
  E* q;                      // (elements of D, kTileQ): transposed, as out
  float* out;                // (D_v, kTileQ)
  float *row_max, *row_sum;  // (kTileQ): running maximum of scores, and sum of exp(score − row_max)
};

// No key seen yet but the sink, a logit without a value. The maximum stays finite, so that
// −inf − row_max is −inf and never NaN.
template <class E>
static void start_tile(const FwdTile<E>& tile, int64_t head_dim_v, const float* sink) {
  const float logit = sink ? *sink : -INFINITY;
  std::fill_n(tile.row_max, kTileQ, logit == -INFINITY ? -FLT_MAX : logit);
  std::fill_n(tile.row_sum, kTileQ, logit == -INFINITY ? 0.0f : 1.0f);
  std::fill_n(tile.out, head_dim_v * kTileQ, 0.0f);
}

// Some keys of a block against some queries of a tile, in V vectors. probs is (kBlockK, kTileQ)
// scratch, operand that which it is packed into.
template <int V, class E, class Scores>
static void attend(const AttnFwdParams& p, const FwdTile<E>& tile, Range queries,
                   const KeyBlock<E>& block, Range keys, float* probs, ScoreOperand<E>& operand,
                   const Scores& scores) {
  const int64_t count = keys.size(), lane0 = queries.begin - tile.queries.begin;
  const int64_t first = keys.begin - block.keys.begin;
  multiply<V>(count, elements<E>(p.head_dim), block.k.rows(first), tile.q + lane0, kTileQ, probs,
              kTileQ, factor_left<E>(query_factor(p)));

  Vec block_max[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) block_max[v] = broadcast(-INFINITY);
  for (int64_t n = 0; n < count; n++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* prob = probs + n * kTileQ + v * kLanes;
      const Vec score = scores.score(n, v, load(prob));
      if (Scores::kHides) store(prob, score);
      block_max[v] = max(score, block_max[v]);  // passes over NaN, which the sum will carry
    }
  }

  Vec row_max[V], rescale[V], block_sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    float* running = tile.row_max + lane0 + v * kLanes;
    const Vec before = load(running);
    row_max[v] = max(block_max[v], before);
    rescale[v] = exp(before - row_max[v]);
    block_sum[v] = zero();
    store(running, row_max[v]);
  }
  for (int64_t n = 0; n < count; n++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* prob = probs + n * kTileQ + v * kLanes;
      const Vec weight = exp(load(prob) - row_max[v]);
      block_sum[v] = block_sum[v] + weight;
      store(prob, scores.keep(n, v, weight));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    float* running = tile.row_sum + lane0 + v * kLanes;
    store(running, fmadd(load(running), rescale[v], block_sum[v]));
  }

  float* out = tile.out + lane0;
  const auto* values = block.v.values(first);
  const int64_t stride = block.v.values_stride();
  const bool clean = (!Scores::kHides || all_finite(values, stride, count, p.head_dim_v)) &&
                     partners_finite(block.v, first, count, block.keys.size(), p.head_dim_v);
  operand.template pack_across<V>(probs, count, first);
  multiply<V>(p.head_dim_v, clean ? operand.depth(count, first) : 0, block.v.columns(first),
              operand.across, kTileQ, out, kTileQ, RescaleAndAdd<V>{rescale});
  if (!clean) multiply_add_visible<V>(p.head_dim_v, count, values, stride, probs, out, scores);
}

template <class T, class E>
static void finish_tile(const FwdTile<E>& tile, int64_t head_dim_v, T* out, int64_t out_stride,
                        float* lse) {
  float inverse[kTileQ];
  for (int i = 0; i < kTileQ; i++) inverse[i] = tile.row_sum[i] == 0 ? 0 : 1 / tile.row_sum[i];
  unpack_transposed(tile.out, inverse, tile.queries.size(), head_dim_v, out, out_stride);
  for (int64_t i = 0; i < tile.queries.size(); i++) {  // a sum of 0: no key was seen
    const float sum = tile.row_sum[i];
    lse[i] = sum == 0 ? -INFINITY : tile.row_max[i] + std::log(sum);
  }
}

template <class T>
static void attend_queries(const AttnFwdParams& p, const Sequence& s, int64_t head, Range queries) {
  const FlushDenormals flush;
  const Window window = make_window(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right);
  Scratch scratch;
  const KeyBlocks<T> blocks(p, s, head / (p.heads_q / p.heads_k), Walk::kRows, Walk::kColumns,
                            scratch);
  ScoreMods mods(p, s, window, scratch);
  mods.set_head(head);
  using E = Operand<T>;
  float* probs = scratch.take(kBlockK * kTileQ);
  ScoreOperand<E> operand(scratch);

  FwdTile<E> tiles[kMaxTiles];
  int count = 0;
  const T* q = head_at<const T>(p.q, p.q_stride, s.batch, s.q_row, head);
  T* out = head_at<T>(p.out, p.out_stride, s.batch, s.q_row, head);
  prefetch_rows(q + queries.begin * p.q_stride.seq, p.q_stride.seq, queries.size(), p.head_dim);
  prefetch_rows(out + queries.begin * p.out_stride.seq, p.out_stride.seq, queries.size(),
                p.head_dim_v);
  for (int64_t i = queries.begin; i < queries.end; i += kTileQ) {
    FwdTile<E>& tile = tiles[count++];
    tile.queries = {i, std::min(i + kTileQ, queries.end)};
    tile.q = take<E>(scratch, padded(p.head_dim) * kTileQ);
    tile.out = scratch.take(padded(p.head_dim_v) * kTileQ);
    tile.row_max = scratch.take(kTileQ);
    tile.row_sum = scratch.take(kTileQ);
    start_tile(tile, p.head_dim_v, p.sinks ? p.sinks + head : nullptr);
    pack_queries(q + i * p.q_stride.seq, p.q_stride.seq, tile.queries.size(), p.head_dim,
                 query_factor(p), tile.q);
  }

  for_each_block(window, queries, [&](Range keys) {
    const KeyBlock<E> block = blocks.load(keys);
    for (int t = 0; t < count; t++) {
      blocks.prefetch(next_slice(window, queries, keys, t, count));
      for_each_segment(window, tiles[t].queries, keys, is_rich(p) ? &mods : nullptr,
                       [&](auto V, Range lanes, Range segment, const auto& scores) {
                         attend<V>(p, tiles[t], lanes, block, segment, probs, operand, scores);
                       });
    }
  });

  float* lse = p.lse + s.batch * p.lse_stride_batch + head * p.lse_stride_head + s.q_row;
  for (int t = 0; t < count; t++) {
    const int64_t i = tiles[t].queries.begin;
    finish_tile(tiles[t], p.head_dim_v, out + i * p.out_stride.seq, p.out_stride.seq, lse + i);
  }
}

// Calls body(element, sequence, head, queries) for all queries, as many a task as share a pass over
// the keys, and keep `floats` each.
template <class Body>
static void for_each_task(const AttnFwdParams& p, int64_t floats, const Pool& pool,
                          const Body& body) {
  const int64_t heads = p.batch * p.heads_q;  // and enough tasks that threads end together:
  const int64_t task_queries = queries_per_pass(floats, heads, p.seqlen_q, 4 * pool.threads());
  const int64_t tasks = ceil_div(p.seqlen_q, task_queries);  // a head
  pool.run(heads * tasks, [&](int64_t index) {
    const int64_t task = tasks - 1 - index / heads;  // causal: the last queries see most keys
    const Sequence s = sequence_at(p, index % heads / p.heads_q);
    const Range queries =
        intersect({0, s.seqlen_q}, {task * task_queries, (task + 1) * task_queries});
    if (queries.empty()) return;
    with_dtype(p.dtype, [&](auto type) { body(type, s, index % heads % p.heads_q, queries); });
  });
}

static void attn_fwd(const AttnFwdParams& p, const Pool& pool) {
  for_each_task(p, p.head_dim + p.head_dim_v, pool,
                [&](auto type, const Sequence& s, int64_t head, Range queries) {
                  attend_queries<decltype(type)>(p, s, head, queries);
                });
}
