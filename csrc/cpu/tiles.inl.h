// Tile sizes, and the ways between tensors and tiles.
//
// The kernels work on transposed tiles: a vector's lanes are queries, and keys and head dims are
// rows. Softmax statistics are then plain vectors, without horizontal operations, and K and V are
// used row-major as they come, one broadcast element at a time. Only Q, out and their gradients are
// transposed.

constexpr int kLanes = Vec::kLanes;
// Vectors of queries a tile: 4 rows × 4 vectors of accumulators fill the FMA pipes of 32 registers,
// 4 × 3 those of 16.
constexpr int kVecs = kLanes == 8 ? 3 : 4;
constexpr int kTileQ = kVecs * kLanes;  // row length of every transposed tile
constexpr int kBlockK = 64;             // keys a block: K, V and P of one block fit L1 at D = 64
constexpr int kPad = 16;                // rows in scratch are padded to a multiple of this

constexpr int kMaxTiles = 16;  // of queries that share a pass over the keys

// How many queries share a pass over the keys: the more, the less the reading and converting of K
// and V costs. But their state, `floats` a query, should stay in 320 KiB of L2, and `heads` heads
// of `seqlen_q` queries should make at least `tasks` passes. No result depends on it.
static int64_t queries_per_pass(int64_t floats, int64_t heads, int64_t seqlen_q, int64_t tasks) {
  int64_t tiles = kMaxTiles;
  const auto too_many = [&] {
    return tiles * kTileQ * floats > 80 * 1024 ||
           heads * ceil_div(seqlen_q, tiles * kTileQ) < tasks;
  };
  while (tiles > 1 && too_many()) tiles /= 2;
  return tiles * kTileQ;
}

constexpr int64_t padded(int64_t cols) { return round_up(cols, kPad); }

// Calls f(integral_constant<int, vecs>).
template <class F>
FASTATTN_INLINE void with_vecs(int vecs, F&& f) {
  if (vecs == 1) f(std::integral_constant<int, 1>{});
  if (vecs == 2) f(std::integral_constant<int, 2>{});
  if (vecs == 3) f(std::integral_constant<int, 3>{});
  if constexpr (kVecs == 4) {
    if (vecs == 4) f(std::integral_constant<int, 4>{});
  }
}

// Calls f with a value of the element type.
template <class F>
static void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::kF32) f(float{});
  if (dtype == DType::kBF16) f(bf16{});
  if (dtype == DType::kF16) f(fp16{});
}

// Elements [0, n) of p, which may be fewer than a vector's; 0 beyond.
template <class T>
FASTATTN_INLINE Vec load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_partial(p, first_lanes(n));
}
template <class T>
FASTATTN_INLINE void store_upto(T* p, Vec x, int64_t n) {
  if (n >= kLanes) {
    store(p, x);
  } else {
    store_partial(p, x, first_lanes(n));
  }
}

// Has rows on their way to L2 that will be read or written soon.
template <class T>
static void prefetch_rows(const T* src, int64_t stride, int64_t rows, int64_t cols) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < cols; c += kLine) prefetch_l2(src + r * stride + c);
  }
}

// (rows, cols) elements, rows `stride` apart, become fp32 rows padded(cols) apart, with zeros
// behind cols.
template <class T>
static void load_rows(const T* src, int64_t stride, int64_t rows, int64_t cols, float* dst) {
  const int64_t ld = padded(cols), whole = cols / kLanes * kLanes;
  for (int64_t r = 0; r < rows; r++, src += stride, dst += ld) {
    for (int64_t c = 0; c < whole; c += kLanes) store(dst + c, load(src + c));
    if (whole < cols) {
      store(dst + whole, load_partial(src + whole, first_lanes(cols - whole)));
    }
    for (int64_t c = round_up(cols, kLanes); c < ld; c += kLanes) store(dst + c, zero());
  }
}

template <class T>
static bool all_finite(const T* src, int64_t stride, int64_t rows, int64_t cols) {
  Vec poison = zero();
  for (int64_t r = 0; r < rows; r++, src += stride) {
    Vec row_poison = zero();  // becomes NaN where 0 · x is; one a row, so that rows don't wait
    const int64_t whole = cols / kLanes * kLanes;
    for (int64_t c = 0; c < whole; c += kLanes) {
      row_poison = fmadd(load(src + c), zero(), row_poison);
    }
    const Vec tail = load_partial(src + whole, first_lanes(cols - whole));
    row_poison = fmadd(tail, zero(), row_poison);
    poison = poison + row_poison;
  }
  return sum(poison) == 0;
}

// dst[c][r …] = lane c of load_row(r, …) in rows of kTileQ; lanes behind `rows` up to a whole
// vector are 0. load_row(r, c) gives kLanes columns from c on, and dst's elements are as wide as a
// lane.
template <class E, class LoadRow>
static void transpose_rows(int64_t rows, int64_t cols, E* dst, const LoadRow& load_row) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) block[i] = r + i < rows ? load_row(r + i, c) : zero();
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        store(reinterpret_cast<float*>(dst + (c + i) * kTileQ + r), block[i]);
      }
    }
  }
}

// dst[c][r] = factor · src[r][c], transposed so.
template <class T>
static void pack_transposed(const T* src, int64_t stride, int64_t rows, int64_t cols, float factor,
                            float* dst) {
  const Vec scale = broadcast(factor);
  transpose_rows(rows, cols, dst, [&](int64_t r, int64_t c) {
    return load_upto(src + r * stride + c, cols - c) * scale;
  });
}

// dst[r][c] = factors[r] · src[c][r], and 0 where the factor is 0, whatever src holds.
template <class T>
static void unpack_transposed(const float* src, const float* factors, int64_t rows, int64_t cols,
                              T* dst, int64_t stride) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vec factor = load(factors + r);
    const Mask zeros = equal(factor, zero());
    for (int64_t c = 0; c < cols; c += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        block[i] = select(zeros, zero(), load(src + (c + i) * kTileQ + r) * factor);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        if (r + i < rows) store_upto(dst + (r + i) * stride + c, block[i], cols - c);
      }
    }
  }
}
