// What matrix products are fed: fp32 numbers, or pairs of bf16 that one instruction multiplies and
// adds up in fp32, at twice the rate of fp32 where kDotsBf16. bf16 tensors then stay as they are,
// and P and dS are rounded to bf16, as they are in eager PyTorch.
//
// A matrix of pairs lies in one of two forms, according to what a product sums over:
//   along    a pair holds neighbours of a row, as in the tensors themselves
//   across   a pair holds one column of two rows, interleaved
// In fp32 both are the matrix itself.

#ifdef FASTATTN_DOTS_BF16
constexpr bool kDotsBf16 = true;
#else
constexpr bool kDotsBf16 = false;
struct PairScores;
#endif

// Has a line that is met soon, and once, on its way. Zen 5 reads 27 GB/s a core by way of L1, 23 by
// L2, of 30 that it could.
FASTATTN_INLINE void prefetch_soon(const void* p) { kDotsBf16 ? prefetch_l1(p) : prefetch_l2(p); }

template <class T>  // T: of the tensors
using Operand = std::conditional_t<kDotsBf16 && std::is_same_v<T, bf16>, bf16x2, float>;
template <class E>
constexpr bool kPairs = std::is_same_v<E, bf16x2>;
template <class E>
constexpr int64_t elements(int64_t products) {
  return kPairs<E> ? ceil_div(products, 2) : products;
}

// Some rows of K or V as the left operand of a product.
template <class E>
struct Rows {
  const E* along;
  int64_t along_stride;
  const E* across;  // null where only the other form is needed
  int64_t across_stride;

  using Value = std::conditional_t<kPairs<E>, bf16, float>;
  const Value* values(int64_t n) const {
    return reinterpret_cast<const Value*>(along + n * along_stride);
  }
  int64_t values_stride() const { return kPairs<E> ? 2 * along_stride : along_stride; }

  // From row n on: element (r, k) is of row n + r, or of column r.
  Left<E> rows(int64_t n) const { return {along + n * along_stride, along_stride, 1}; }
  Left<E> columns(int64_t n) const {
    return {across + (kPairs<E> ? n / 2 : n) * across_stride, 1, across_stride};
  }
};

// Whether rows [first, first + count) of a block of `rows` can be multiplied as columns: a pair at
// their ends may hold a row that is not theirs, and a weight of 0 keeps no NaN out.
template <class E>
static bool partners_finite(const Rows<E>& x, int64_t first, int64_t count, int64_t rows,
                            int64_t cols) {
  if constexpr (!kPairs<E>) return true;
  const int64_t end = first + count, stride = x.values_stride();
  const bool before = first % 2 == 0 || all_finite(x.values(first - 1), stride, 1, cols);
  return before && (end % 2 == 0 || end == rows || all_finite(x.values(end), stride, 1, cols));
}

template <class E>
static E* take(Scratch& scratch, int64_t count) {
  return reinterpret_cast<E*>(scratch.take(count));  // E is as large as a float
}

// Rows of a tensor across, rows padded(cols) wide.
template <class T>
static void pack_rows(const T* src, int64_t stride, int64_t rows, int64_t cols, Operand<T>* dst) {
  if constexpr (kPairs<Operand<T>>) {
    interleave_rows(src, stride, rows, cols, dst, padded(cols));
  } else {
    load_rows(src, stride, rows, cols, dst);
  }
}

// Element (r, c) of a matrix across, rows ld apart.
static float value_across(const float* src, int64_t ld, int64_t r, int64_t c) {
  return src[r * ld + c];
}
static float value_across(const bf16x2* src, int64_t ld, int64_t r, int64_t c) {
  const bf16x2 pair = src[r / 2 * ld + c];
  return to_float(r % 2 == 0 ? pair.first : pair.second);
}

// A tile of Q or dO for products over the head dim: dst (elements of cols, kTileQ), transposed.
// fp32 is multiplied by `factor` on the way; of pairs, the products are: see factor_left.
template <class T>
static void pack_queries(const T* src, int64_t stride, int64_t rows, int64_t cols, float factor,
                         Operand<T>* dst) {
  if constexpr (kPairs<Operand<T>>) {
    transpose_rows(rows, elements<Operand<T>>(cols), dst, [&](int64_t r, int64_t c) {
      return load_bits(src + r * stride + 2 * c, cols - 2 * c);
    });
  } else {
    pack_transposed(src, stride, rows, cols, factor, dst);
  }
}

// How products of what pack_queries made join their tile.
template <class E>
static auto factor_left(float factor) {
  if constexpr (kPairs<E>) {
    return Scale{broadcast(factor)};
  } else {
    return Set{};
  }
}

// P or dS of some keys, (keys, kTileQ) in fp32, as operands: `across` keys for products over them,
// `along` queries for those over queries.
struct Fp32Scores {
  static constexpr int64_t kStride = kTileQ;  // of along
  const float *along, *across;

  explicit Fp32Scores(Scratch&) {}
  static int64_t depth(int64_t count, int64_t) { return count; }  // elements of across
  template <int V>
  void pack_across(const float* scores, int64_t, int64_t) {
    across = scores;
  }
  template <int V>
  void pack_along(const float* scores, int64_t, int64_t) {
    along = scores;
  }
};

template <class E>
using ScoreOperand = std::conditional_t<kPairs<E>, PairScores, Fp32Scores>;
