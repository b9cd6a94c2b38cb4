// The one matrix product under all others: C (+)= A·B, A read by broadcast in either order, B and C
// rows of vectors. It keeps a block of rows × vectors of C in registers and runs at 97+ % of the
// FMA peak from L1.

// A's element (r, k) is at[r · row + k · depth].
template <class E>
struct Left {
  const E* at;
  int64_t row, depth;
};

// How sums of products, while still in registers, join C: join(c, v, sum) is what is stored at
// c. Adding at the end instead of starting from C costs the same and keeps rounding errors from
// growing with the number of blocks.
struct Set {
  FASTATTN_INLINE Vec operator()(const float*, int, Vec sum) const { return sum; }
};
struct Scale {
  Vec factor;
  FASTATTN_INLINE Vec operator()(const float*, int, Vec sum) const { return sum * factor; }
};
struct Add {
  FASTATTN_INLINE Vec operator()(const float* c, int, Vec sum) const { return load(c) + sum; }
};
// C is in no cache yet: it is prefetched while the sums are made.
struct AddFar : Add {};
template <int V>
struct RescaleAndAdd {  // C's columns are multiplied by `scale` first
  const Vec (&scale)[V];
  FASTATTN_INLINE Vec operator()(const float* c, int v, Vec sum) const {
    return fmadd(load(c), scale[v], sum);
  }
};

// R rows × V vectors of C from `row` on, over `depth` elements each.
template <int R, int V, class E, class Join>
FASTATTN_INLINE void multiply_block(int64_t row, int64_t depth, Left<E> a, const E* b, int64_t ldb,
                                    float* c, int64_t ldc, const Join& join) {
  a.at += row * a.row;
  c += row * ldc;
  Vec acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      if constexpr (std::is_same_v<Join, AddFar>) prefetch_l1(c + r * ldc + v * kLanes);
      acc[r][v] = zero();
    }
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++) {
    decltype(load(b)) right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const auto left = broadcast(a.at[r * a.row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = fmadd(left, right[v], acc[r][v]);
    }
    a.at += a.depth;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* out = c + r * ldc + v * kLanes;
      store(out, join(out, v, acc[r][v]));
    }
  }
}

// Rows a block: enough accumulators to cover the FMA latency (8 of them), few enough to stay in
// registers.
template <int V>
constexpr int kRows = V == 1 || (V == 2 && kLanes == 16) ? 8 : 4;

// Not inlined: inside a larger function GCC 12 runs out of registers and spills accumulators.
template <int V, class E, class Join>
__attribute__((noinline)) static void multiply(int64_t rows, int64_t depth, Left<E> a, const E* b,
                                               int64_t ldb, float* c, int64_t ldc,
                                               const Join& join) {
  int64_t r = 0;
  for (; r + kRows<V> <= rows; r += kRows<V>) {
    multiply_block<kRows<V>, V>(r, depth, a, b, ldb, c, ldc, join);
  }
  for (; r < rows; r++) multiply_block<1, V>(r, depth, a, b, ldb, c, ldc, join);
}

// C += A·B, B and C `cols` wide (a multiple of kPad).
template <class E>
static void multiply_add(int64_t rows, int64_t depth, int64_t cols, Left<E> a, const E* b,
                         float* c) {
  for (int64_t col = 0; col < cols; col += kTileQ) {
    const int vecs = int(std::min<int64_t>(kVecs, (cols - col) / kLanes));
    with_vecs(vecs,
              [&](auto V) { multiply<V>(rows, depth, a, b + col, cols, c + col, cols, Add{}); });
  }
}
