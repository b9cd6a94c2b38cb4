// A few queries against a long KV cache: what limits them is reading K and V, once.
//
// An item is some KV heads of one sequence, with all query heads of their groups, and some of its
// queries. It goes through the keys block by block: scores of all rows, online softmax, out += P·V.
// Heads of a key usually lie side by side, so a few keys of all heads come before the next keys:
// head by head, every key of every head would be on another page. What comes next is prefetched
// meanwhile, in the order of the memory: hardware prefetchers follow neither such strides nor a
// page table. On Zen 5 one thread reads at 75–82 % of what a sum over K and V does, two at 78–86 %:
// from cache, too, these loops take 44 GB/s a thread, little more than memory gives.
//
// Keys are further cut into chunks, each with a result of its own, and these are merged in order.
// Which thread computed which chunk then makes no difference: results are the same bits for any
// number of splits or threads, paged or not.
//
// A row is one query head of one query. A query sees a range of keys, so tiles of its rows need no
// masking: their loops end with the range.
namespace decode {

constexpr int64_t kChunkKeys = 512;
constexpr int64_t kItemRows = 64;       // of an item: at most, but at least one query's and head's
constexpr int64_t kSharedStep = 16;     // keys an item of several heads takes at a time
constexpr int64_t kTasksPerThread = 4;  // below that keys are split, so that threads end together

// Attention over some keys, not normalised yet.
struct Partial {
  float* row_max;  // (rows); starts at -FLT_MAX, so that −inf − max is not NaN
  float* row_sum;  // (rows): Σ exp(s − row_max)
  float* out;      // (rows, ld): Σ exp(s − row_max)·v
  int64_t rows, ld;

  static int64_t floats(int64_t rows, int64_t ld) { return rows * ld + round_up(2 * rows, 16); }
  static Partial in(float* memory, int64_t rows, int64_t ld) {
    return {memory + rows * ld, memory + rows * ld + rows, memory, rows, ld};
  }

  void clear() const {
    std::fill_n(row_max, rows, -FLT_MAX);
    std::fill_n(row_sum, rows, 0.0f);
    std::fill_n(out, rows * ld, 0.0f);
  }

  void merge(const Partial& other) const {
    for (int64_t r = 0; r < rows; r++) {
      const float m = std::max(row_max[r], other.row_max[r]);
      const float ours = std::exp(row_max[r] - m), theirs = std::exp(other.row_max[r] - m);
      row_max[r] = m;
      row_sum[r] = row_sum[r] * ours + other.row_sum[r] * theirs;
      for (int64_t c = r * ld; c < (r + 1) * ld; c += kLanes) {
        const Vec added = load(other.out + c) * broadcast(theirs);
        store(out + c, fmadd(load(out + c), broadcast(ours), added));
      }
    }
  }
};

// Some KV heads and some queries of one sequence.
struct Item {
  int64_t batch;
  Range heads_k, queries;
  Window window;
  Range keys;  // what at least one of the queries sees
  int64_t rows;

  // At least one, so that queries which see nothing get their result too.
  int64_t chunks() const { return keys.empty() ? 1 : ceil_div(keys.size(), kChunkKeys); }
};

template <class T>
class Decoder {
 public:
  Decoder(const AttnDecodeParams& p, const Pool& pool)
      : p_(p),
        pool_(pool),
        group_(p.heads_q / p.heads_k),
        item_queries_(std::max<int64_t>(1, std::min(p.seqlen_q, kItemRows / group_))),
        ldq_(round_up(p.head_dim, kLanes)),
        ld_(round_up(p.head_dim_v, kLanes)) {
    for (int64_t i = 0; i < items(); i += head_blocks()) {
      most_chunks_ = std::max(most_chunks_, item(i).chunks());
    }
    // As many heads as fit, where they share pages, unless that would leave threads without work.
    const int64_t tasks = pool.threads() == 1 ? 1 : kTasksPerThread * pool.threads();
    if (p.k_stride.head < p.k_stride.seq) {
      item_heads_ = std::clamp<int64_t>(kItemRows / (group_ * item_queries_), 1, p.heads_k);
      while (item_heads_ > 1 && items() * most_chunks_ < tasks)
        item_heads_ = ceil_div(item_heads_, 2);
    }
    step_keys_ = item_heads_ > 1 ? kSharedStep : kBlockKeys;
    splits_ = std::min(p.num_splits > 0 ? p.num_splits : ceil_div(tasks, items()), most_chunks_);
  }

  void run() const {
    if (splits_ == 1) {
      pool_.run(items(), [&](int64_t i) { run_whole(item(i)); });
      return;
    }
    const int64_t size = Partial::floats(item_heads_ * item_queries_ * group_, ld_);
    const Buffer memory(size_t(items() * most_chunks_ * size));
    const auto partial = [&](int64_t i, const Item& it, int64_t chunk) {
      return Partial::in(memory.data() + (i * most_chunks_ + chunk) * size, it.rows, ld_);
    };
    pool_.run(items() * splits_, [&](int64_t task) {
      const int64_t i = task / splits_, split = task % splits_;
      const Item it = item(i);
      const Range chunks{split * it.chunks() / splits_, (split + 1) * it.chunks() / splits_};
      if (chunks.empty()) return;
      Scratch scratch;
      const float* q = pack_queries(it, scratch);
      float* scores = scratch.take(it.rows * (kScoreStride + 1));
      for (int64_t c = chunks.begin; c < chunks.end; c++) {
        attend(it, c, q, scores, partial(i, it, c));
      }
    });
    pool_.run(items(), [&](int64_t i) {
      const Item it = item(i);
      const Partial total = partial(i, it, 0);
      for (int64_t c = 1; c < it.chunks(); c++) total.merge(partial(i, it, c));
      write(it, total);
    });
  }

 private:
  int64_t query_blocks() const { return ceil_div(p_.seqlen_q, item_queries_); }
  int64_t head_blocks() const { return ceil_div(p_.heads_k, item_heads_); }
  int64_t items() const { return head_blocks() * p_.batch * query_blocks(); }

  Item item(int64_t index) const {
    const int64_t head = index % head_blocks() * item_heads_;
    const Range heads{head, std::min(head + item_heads_, p_.heads_k)};
    const int64_t first = index / head_blocks() % query_blocks() * item_queries_;
    const Range queries{first, std::min(first + item_queries_, p_.seqlen_q)};
    const int64_t b = index / head_blocks() / query_blocks();
    const int64_t length = p_.cache_seqlens[b] + p_.seqlen_new;
    const Range valid{p_.cache_leftpad ? p_.cache_leftpad[b] : 0, length};
    const Window window = make_window(p_.seqlen_q, length, p_.window_left, p_.window_right);
    const Range keys = intersect(valid, keys_seen_by_any(window, queries));
    return {b, heads, queries, window, keys, heads.size() * queries.size() * group_};
  }

  // Row r of an item: rows of one query and KV head lie side by side.
  struct Row {
    int64_t query, head;
  };
  Row row(const Item& it, int64_t r) const {
    const int64_t n = r / group_, queries = it.queries.size();
    return {it.queries.begin + n % queries, (it.heads_k.begin + n / queries) * group_ + r % group_};
  }

  void run_whole(const Item& it) const {
    Scratch scratch;
    const float* q = pack_queries(it, scratch);
    const int64_t size = Partial::floats(it.rows, ld_);
    const Partial total = Partial::in(scratch.take(size), it.rows, ld_);
    const Partial next = Partial::in(scratch.take(size), it.rows, ld_);
    float* scores = scratch.take(it.rows * (kScoreStride + 1));
    attend(it, 0, q, scores, total);
    for (int64_t c = 1; c < it.chunks(); c++) {
      attend(it, c, q, scores, next);
      total.merge(next);
    }
    write(it, total);
  }

  // scale·q, (rows, ldq).
  const float* pack_queries(const Item& it, Scratch& scratch) const {
    float* packed = scratch.take(it.rows * ldq_);
    const Vec scale = broadcast(p_.scale);
    for (int64_t r = 0; r < it.rows; r++) {
      const auto [i, head] = row(it, r);
      const T* q = static_cast<const T*>(p_.q) + it.batch * p_.q_stride.batch +
                   i * p_.q_stride.seq + head * p_.q_stride.head;
      float* to = packed + r * ldq_;
      int64_t d = 0;
      for (; d + 2 * kLanes <= p_.head_dim; d += 2 * kLanes) {
        const Pair x = load_pair(q + d);
        store(to + d, x.a * scale);
        store(to + d + kLanes, x.b * scale);
      }
      for (; d < p_.head_dim; d += kLanes) store(to + d, load_upto(q + d, p_.head_dim - d) * scale);
    }
    return packed;
  }

  // Attention over one chunk of an item's keys.
  void attend(const Item& it, int64_t chunk, const float* q, float* s,
              const Partial& result) const {
    [[maybe_unused]] const FlushDenormals flush;
    result.clear();
    const int64_t begin = it.keys.begin + chunk * kChunkKeys;
    const int64_t end = std::min(begin + kChunkKeys, it.keys.end);
    float* scale = s + it.rows * kScoreStride;  // what the rows' earlier terms are multiplied by
    Block blocks[2];
    find_rows(it, begin, end, &blocks[0]);
    for (int64_t j = begin, turn = 0; j < end; j += kBlockKeys, turn ^= 1) {
      const Range block{j, std::min(j + kBlockKeys, end)};
      const KeyRows<T> k = k_rows(blocks[turn]), v = v_rows(blocks[turn]);
      const bool more = find_rows(it, j + kBlockKeys, it.keys.end, &blocks[turn ^ 1]);
      const KeyRows<T> next_k = more ? k_rows(blocks[turn ^ 1]) : KeyRows<T>{};

      const auto score = [&](int64_t row, Range keys, KeyRows<T> k_seen, Prefetcher<T>*& ahead) {
        for_each_tile(row, [&](auto tile, int64_t r) {
          float* scores = s + r * kScoreStride + keys.begin - j;
          dot_products<tile.value>(q + r * ldq_, ldq_, k_seen, keys.size(),
                                   std::exchange(ahead, nullptr), scores);
        });
      };
      const auto add = [&](int64_t row, Range keys, KeyRows<T> v_seen, Prefetcher<T>*& ahead) {
        for_each_tile(row, [&](auto tile, int64_t r) {
          const float* weights = s + r * kScoreStride + keys.begin - j;
          add_values<tile.value>(weights, scale + r, v_seen, keys.size(),
                                 std::exchange(ahead, nullptr), result.out + r * ld_, ld_);
          std::fill_n(scale + r, tile.value, 1.0f);
        });
      };
      for_each_meeting(it, block, k, v, score);
      softmax(it, block, s, scale, result);
      for_each_meeting(it, block, v, next_k, add);
    }
  }

  // Keys and values of a block's positions, of head 0.
  struct Block {
    const T* k[kBlockKeys];
    const T* v[kBlockKeys];
  };
  KeyRows<T> k_rows(const Block& block) const { return {block.k, p_.k_stride.head, p_.head_dim}; }
  KeyRows<T> v_rows(const Block& block) const { return {block.v, p_.v_stride.head, p_.head_dim_v}; }

  // The rows of at most kBlockKeys keys of [begin, end); whether there are any. What is left of the
  // block repeats the last, for prefetching.
  bool find_rows(const Item& it, int64_t begin, int64_t end, Block* block) const {
    if (begin >= end) return false;
    const CachePlace place(p_, it.batch);
    end = std::min(end, begin + kBlockKeys);
    for (int64_t j = begin; j < end;) {
      const int64_t run = place.run_length(j, end);
      const T* k = static_cast<const T*>(p_.k_cache) + place.offset(j, p_.k_stride);
      const T* v = static_cast<const T*>(p_.v_cache) + place.offset(j, p_.v_stride);
      for (int64_t n = 0; n < run; n++) {
        block->k[j - begin + n] = k + n * p_.k_stride.seq;
        block->v[j - begin + n] = v + n * p_.v_stride.seq;
      }
      j += run;
    }
    std::fill(block->k + (end - begin), block->k + kBlockKeys, block->k[end - begin - 1]);
    std::fill(block->v + (end - begin), block->v + kBlockKeys, block->v[end - begin - 1]);
    return true;
  }

  // Calls work(first row, keys, their rows, prefetcher) for every head and query and the keys of
  // the block that it sees, step_keys_ of them at a time. Meanwhile the next step's are prefetched,
  // by the first tile of each head; `after` follows on the block.
  template <class Work>
  void for_each_meeting(const Item& it, Range block, const KeyRows<T>& rows,
                        const KeyRows<T>& after, const Work& work) const {
    for (int64_t j = block.begin; j < block.end; j += step_keys_) {
      const Range step{j, std::min(j + step_keys_, block.end)};
      const KeyRows<T> here = rows.from(j - block.begin);
      const KeyRows<T> next = step.end == block.end ? after : rows.from(step.end - block.begin);
      Prefetcher<T> prefetcher(next.head(it.heads_k.begin), step_keys_, it.heads_k.size());
      for (int64_t head = it.heads_k.begin; head < it.heads_k.end; head++) {
        Prefetcher<T>* ahead = &prefetcher;
        for (int64_t i = it.queries.begin; i < it.queries.end; i++) {
          const Range keys = intersect(step, keys_seen_by_any(it.window, {i, i + 1}));
          if (keys.empty()) continue;
          const int64_t n = (head - it.heads_k.begin) * it.queries.size() + i - it.queries.begin;
          work(n * group_, keys, here.head(head).from(keys.begin - j), ahead);
        }
      }
    }
  }

  // Calls f(integral_constant<tile>, first row) for the rows of a query and KV head.
  template <class F>
  void for_each_tile(int64_t row, const F& f) const {
    const int64_t end = row + group_;
    if constexpr (kMaxTile == 4) {
      for (; row + 4 <= end; row += 4) f(std::integral_constant<int, 4>{}, row);
      for (; row + 2 <= end; row += 2) f(std::integral_constant<int, 2>{}, row);
    }
    for (; row < end; row++) f(std::integral_constant<int, 1>{}, row);
  }

  void softmax(const Item& it, Range block, float* s, float* scale, const Partial& result) const {
    for (int64_t r = 0; r < it.rows; r++) {
      const auto [i, head] = row(it, r);
      const Range keys = intersect(block, keys_seen_by_any(it.window, {i, i + 1}));
      if (keys.empty()) continue;
      float* scores = s + r * kScoreStride + keys.begin - block.begin;
      const float slope =
          p_.alibi_slopes ? p_.alibi_slopes[it.batch * p_.alibi_stride_batch + head] : 0.0f;
      const float distance = float(i + it.window.diagonal - keys.begin);
      modify_scores(scores, keys.size(), p_.softcap, slope, distance);
      scale[r] = online_softmax(scores, keys.size(), result.row_max[r], result.row_sum[r]);
    }
  }

  // out and lse of an item's rows, after the sinks have joined.
  void write(const Item& it, const Partial& total) const {
    for (int64_t r = 0; r < it.rows; r++) {
      const auto [i, head] = row(it, r);
      float row_max = total.row_max[r], row_sum = total.row_sum[r], scale = 1;
      if (p_.sinks) {
        const float m = std::max(row_max, p_.sinks[head]);
        scale = std::exp(row_max - m);
        row_sum = row_sum * scale + std::exp(p_.sinks[head] - m);
        row_max = m;
      }
      const bool empty = row_sum == 0;
      p_.lse[it.batch * p_.lse_stride_batch + head * p_.lse_stride_head + i] =
          empty ? -INFINITY : row_max + std::log(row_sum);
      const Vec factor = broadcast(empty ? 0.0f : scale / row_sum);
      T* out = static_cast<T*>(p_.out) + it.batch * p_.out_stride.batch + i * p_.out_stride.seq +
               head * p_.out_stride.head;
      const float* from = total.out + r * ld_;
      int64_t c = 0;
      for (; c + 2 * kLanes <= p_.head_dim_v; c += 2 * kLanes) {
        store_pair(out + c, {load(from + c) * factor, load(from + c + kLanes) * factor});
      }
      for (; c < p_.head_dim_v; c += kLanes) {
        store_upto(out + c, load(from + c) * factor, p_.head_dim_v - c);
      }
    }
  }

  const AttnDecodeParams& p_;
  const Pool& pool_;
  int64_t group_;                          // query heads per KV head
  int64_t item_queries_, item_heads_ = 1;  // queries and KV heads of an item
  int64_t ldq_, ld_;
  int64_t step_keys_ = kBlockKeys;
  int64_t most_chunks_ = 1, splits_ = 1;  // of an item; tasks an item makes
};

}  // namespace decode

static void attn_decode(const AttnDecodeParams& p, const Pool& pool) {
  if (p.batch == 0 || p.seqlen_q == 0 || p.heads_q == 0) return;
  with_dtype(p.dtype, [&](auto type) { decode::Decoder<decltype(type)>(p, pool).run(); });
}
