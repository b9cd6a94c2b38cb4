// softmax(scale·QKᵀ …)V, tile by tile with an online softmax (Dao et al., "FlashAttention", 2022).
//
// A task is some tiles of queries of one head; keys pass by in blocks of kBlockK, and each tile
// keeps Oᵀ (D_v, kTileQ) with the running maximum and sum of its queries. Blocks outside the window
// are skipped, and only segments on its edge are masked.

constexpr int64_t kTaskQueries = 256;  // K and V are read and converted once per this many queries

struct FwdTile {
  Range queries;
  float *q, *out;            // (D, kTileQ), (D_v, kTileQ): transposed
  float *row_max, *row_sum;  // (kTileQ): running maximum of scores, and sum of exp(score − row_max)
};

// A block of keys in scratch.
struct KeyBlock {
  Range keys;
  int64_t ld_k, ld_v;
  float *k, *v;  // (kBlockK, ld_k), (kBlockK, ld_v)
  bool v_finite;

  const float* k_row(int64_t key) const { return k + (key - keys.begin) * ld_k; }
  const float* v_row(int64_t key) const { return v + (key - keys.begin) * ld_v; }
};

// C (rows, kTileQ) += A·B (keys, kTileQ) over the visible pairs alone: where A holds NaN or inf, 0
// · A must not reach queries that don't see its key.
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

// One segment of keys against V vectors of a tile, from lane `lane0` on; probs is scratch (kBlockK,
// kTileQ).
template <int V, class Scores>
static void attend(const FwdTile& tile, int lane0, int64_t head_dim, int64_t head_dim_v,
                   const KeyBlock& block, Range keys, float* probs, const Scores& scores) {
  const int64_t count = keys.size();
  multiply<V>(count, head_dim, {block.k_row(keys.begin), block.ld_k, 1}, tile.q + lane0, kTileQ,
              probs, kTileQ, Set{});

  Vec block_max[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) block_max[v] = broadcast(-INFINITY);
  for (int64_t n = 0; n < count; n++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* p = probs + n * kTileQ + v * kLanes;
      const Vec score = scores.score(n, v, load(p));
      if (Scores::kHides) store(p, score);
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
      float* p = probs + n * kTileQ + v * kLanes;
      const Vec prob = exp(load(p) - row_max[v]);
      block_sum[v] = block_sum[v] + prob;
      store(p, scores.keep(n, v, prob));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    float* running = tile.row_sum + lane0 + v * kLanes;
    store(running, fmadd(load(running), rescale[v], block_sum[v]));
  }

  const Left values{block.v_row(keys.begin), 1, block.ld_v};
  if (Scores::kHides && !block.v_finite) {
    multiply<V>(head_dim_v, 0, values, probs, kTileQ, tile.out + lane0, kTileQ,
                RescaleAndAdd<V>{rescale});
    multiply_add_visible<V>(head_dim_v, count, values, probs, tile.out + lane0, scores);
  } else {
    multiply<V>(head_dim_v, count, values, probs, kTileQ, tile.out + lane0, kTileQ,
                RescaleAndAdd<V>{rescale});
  }
}

// Initial state: no key seen yet but the sink, a logit without a value. The maximum stays finite,
// so that −inf − row_max is −inf and never NaN.
static void start_tile(const FwdTile& tile, int64_t head_dim_v, const float* sink) {
  const float logit = sink ? *sink : -INFINITY;
  std::fill_n(tile.row_max, kTileQ, logit == -INFINITY ? -FLT_MAX : logit);
  std::fill_n(tile.row_sum, kTileQ, logit == -INFINITY ? 0.0f : 1.0f);
  std::fill_n(tile.out, head_dim_v * kTileQ, 0.0f);
}

template <class T>
static void finish_tile(const FwdTile& tile, int64_t head_dim_v, T* out, int64_t out_stride,
                        float* lse) {
  float inverse[kTileQ];
  for (int i = 0; i < kTileQ; i++) inverse[i] = tile.row_sum[i] == 0 ? 0 : 1 / tile.row_sum[i];
  unpack_transposed(tile.out, inverse, tile.queries.size(), head_dim_v, out, out_stride);
  for (int64_t i = 0; i < tile.queries.size(); i++) {  // −inf where no key was seen
    lse[i] = tile.row_sum[i] == 0 ? -INFINITY : tile.row_max[i] + std::log(tile.row_sum[i]);
  }
}

template <class T>
static void attend_queries(const AttnFwdParams& p, const Sequence& s, int64_t head, Range queries) {
  const Window window = make_window(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right);
  const int64_t head_k = head / (p.heads_q / p.heads_k);
  const auto at = [&](const void* base, const Strides& stride, int64_t row, int64_t h) {
    return static_cast<const T*>(base) + s.batch * stride.batch + row * stride.seq +
           h * stride.head;
  };
  const T* q = at(p.q, p.q_stride, s.q_row, head);
  const T* k = at(p.k, p.k_stride, s.k_row, head_k);
  const T* v = at(p.v, p.v_stride, s.k_row, head_k);
  T* out = const_cast<T*>(at(p.out, p.out_stride, s.q_row, head));
  float* lse = p.lse + s.batch * p.lse_stride_batch + head * p.lse_stride_head + s.q_row;

  const FlushDenormals flush;
  Scratch scratch;
  KeyBlock block{};
  block.ld_k = round_up(p.head_dim, kPad);
  block.ld_v = round_up(p.head_dim_v, kPad);
  block.k = scratch.take(kBlockK * block.ld_k);
  block.v = scratch.take(kBlockK * block.ld_v);
  float* probs = scratch.take(kBlockK * kTileQ);
  const bool rich = is_rich(p);
  ScoreMods mods(p, s, window, head);
  if (rich) mods.take_scratch(scratch);

  FwdTile tiles[ceil_div(kTaskQueries, kTileQ)];
  int count = 0;
  for (int64_t i = queries.begin; i < queries.end; i += kTileQ) {
    FwdTile& tile = tiles[count++];
    tile.queries = {i, std::min(i + kTileQ, queries.end)};
    tile.q = scratch.take(block.ld_k * kTileQ);
    tile.out = scratch.take(block.ld_v * kTileQ);
    tile.row_max = scratch.take(kTileQ);
    tile.row_sum = scratch.take(kTileQ);
    start_tile(tile, p.head_dim_v, p.sinks ? p.sinks + head : nullptr);
    pack_transposed(q + i * p.q_stride.seq, p.q_stride.seq, tile.queries.size(), p.head_dim,
                    query_factor(p), tile.q);
  }

  const Range keys = keys_seen_by_any(window, queries);
  for (int64_t n = keys.begin / kBlockK * kBlockK; n < keys.end; n += kBlockK) {
    block.keys = intersect({n, n + kBlockK}, keys);
    const int64_t first = block.keys.begin;
    load_rows(k + first * p.k_stride.seq, p.k_stride.seq, block.keys.size(), p.head_dim, block.k,
              block.ld_k);
    block.v_finite = load_rows(v + first * p.v_stride.seq, p.v_stride.seq, block.keys.size(),
                               p.head_dim_v, block.v, block.ld_v);
    for (int t = 0; t < count; t++) {
      const FwdTile& tile = tiles[t];
      Range rest = intersect(block.keys, keys_seen_by_any(window, tile.queries));
      while (!rest.empty()) {
        const Segment segment = next_segment(window, tile.queries, kLanes, rest);
        rest.begin = segment.keys.end;
        const int lane0 = segment.vec_begin * kLanes;
        const int64_t query0 = tile.queries.begin + lane0;
        with_vecs(segment.vec_end - segment.vec_begin, [&](auto V) {
          const auto run = [&](const auto& scores) {
            attend<V>(tile, lane0, p.head_dim, p.head_dim_v, block, segment.keys, probs, scores);
          };
          if (rich) {
            const Range lanes{query0, std::min<int64_t>(tile.queries.end, query0 + V * kLanes)};
            run(mods.prepare(lanes, segment.keys, segment.edge));
          } else if (segment.edge) {
            run(EdgeScores(window, query0, segment.keys.begin));
          } else {
            run(PlainScores{});
          }
        });
      }
    }
  }
  for (int t = 0; t < count; t++) {
    const int64_t i = tiles[t].queries.begin;
    finish_tile(tiles[t], p.head_dim_v, out + i * p.out_stride.seq, p.out_stride.seq, lse + i);
  }
}

static void attn_fwd(const AttnFwdParams& p, const Pool& pool) {
  // Several tiles a task, but enough tasks that threads end together.
  const int64_t heads = p.batch * p.heads_q;
  int64_t task_queries = kTaskQueries / kTileQ * kTileQ;
  while (task_queries > kTileQ && heads * ceil_div(p.seqlen_q, task_queries) < 4 * pool.threads()) {
    task_queries = round_up(task_queries / 2, kTileQ);
  }
  const int64_t tasks = ceil_div(p.seqlen_q, task_queries);  // a head
  pool.run(heads * tasks, [&](int64_t index) {
    const int64_t task = tasks - 1 - index / heads;  // causal: the last queries see most keys
    const Sequence s = sequence_at(p, index % heads / p.heads_q);
    const Range queries =
        intersect({0, s.seqlen_q}, {task * task_queries, (task + 1) * task_queries});
    if (queries.empty()) return;
    with_dtype(p.dtype, [&](auto type) {
      attend_queries<decltype(type)>(p, s, index % heads % p.heads_q, queries);
    });
  });
}
