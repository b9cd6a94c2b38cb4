// C (+)= A·B in fp32, the matrix products of linear cross-entropy. A, B are fp32, bf16 or fp16,
// each with either of its dimensions contiguous; where bf16 goes in pairs, B bf16 makes A bf16 too.
//
// A task owns a block of C. For kDepth of the summed dimension at a time it packs its rows of A,
// which stay in L2, and panel by panel of kTileQ columns B, which stays in L1 (Goto & van de Geijn,
// "Anatomy of high-performance matrix multiplication", 2008).
namespace matmul {

constexpr int64_t kDepth = 128;  // elements: a panel of B is 32 KB with AVX-512
// Rows and columns: kMaxBlock × kDepth elements of A are 512 KB.
constexpr int64_t kMaxBlock = 1024;
constexpr int64_t kMinBlock = 2 * kTileQ;
// Between rows of A packed across. They are met a few elements at a time: rows of kMaxBlock, 4 KB
// apart, would share one set of L1.
constexpr int64_t kAcross = kMaxBlock + 16;

template <class T>
struct Matrix {
  const T* at;
  int64_t row, col;  // strides; one of them is 1
};

// `lines` lines of `length` contiguous elements each, `stride` apart, as fp32.
template <class T>
static void pack_lines(const T* src, int64_t stride, int64_t lines, int64_t length, float* dst,
                       int64_t ld) {
  for (int64_t l = 0; l < lines; l++, src += stride, dst += ld) {
    for (int64_t i = 0; i < length; i += kLanes) {
      store(dst + i, load_upto(src + i, length - i));
    }
  }
}

// Rows [0, rows) and depth [0, depth) of A.
template <class E, class T>
static Left<E> pack_left(const Matrix<T>& a, int64_t rows, int64_t depth, E* dst) {
  if constexpr (kPairs<E>) {
    if (a.col == 1) {
      round_rows(a.at, a.row, rows, depth, &dst->first, 2 * kDepth);
      return {dst, kDepth, 1};
    }
    interleave_rows(a.at, a.col, depth, rows, dst, kAcross);
    return {dst, 1, kAcross};
  } else {
    if (a.col == 1) {
      pack_lines(a.at, a.row, rows, depth, dst, kDepth);
      return {dst, kDepth, 1};
    }
    pack_lines(a.at, a.col, depth, rows, dst, kAcross);
    return {dst, 1, kAcross};
  }
}

// Depth [0, depth) and columns [0, cols ≤ kTileQ) of B, in rows of kTileQ.
template <class E, class T>
static void pack_right(const Matrix<T>& b, int64_t depth, int64_t cols, E* dst) {
  if (b.row == 1) {
    pack_queries(b.at, b.col, cols, depth, 1.0f, dst);
  } else if constexpr (kPairs<E>) {
    interleave_rows(b.at, b.row, depth, cols, dst, kTileQ);
  } else {
    pack_lines(b.at, b.row, depth, cols, dst, kTileQ);
  }
}

// C (rows, cols) = or += left · panel. `spare` is (rows, kTileQ), for columns that don't fill
// vectors.
template <class E>
static void multiply_panel(Left<E> left, const E* panel, int64_t rows, int64_t cols, int64_t depth,
                           bool add, float* c, int64_t ldc, float* spare) {
  const bool whole = cols % kLanes == 0;
  float* out = whole ? c : spare;
  const int64_t ld = whole ? ldc : kTileQ;
  with_vecs(int(ceil_div(cols, kLanes)), [&](auto V) {
    if (add && whole) {
      multiply<V>(rows, depth, left, panel, kTileQ, out, ld, Add{});
    } else {
      multiply<V>(rows, depth, left, panel, kTileQ, out, ld, Set{});
    }
  });
  if (whole) return;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t i = 0; i < cols; i++) {
      c[r * ldc + i] = spare[r * kTileQ + i] + (add ? c[r * ldc + i] : 0.0f);
    }
  }
}

template <class TA, class TB>
static void run(const MatmulParams& p, const Pool& pool) {
  using E = Operand<TB>;
  constexpr int64_t kStep = kDepth * (kPairs<E> ? 2 : 1);
  const Matrix<TA> a{static_cast<const TA*>(p.a), p.a_row, p.a_col};
  const Matrix<TB> b{static_cast<const TB*>(p.b), p.b_row, p.b_col};
  int64_t block_rows = std::min(p.rows, kMaxBlock), block_cols = std::min(p.cols, kMaxBlock);
  const auto tasks = [&] { return ceil_div(p.rows, block_rows) * ceil_div(p.cols, block_cols); };
  while (tasks() < 2 * pool.threads() && std::max(block_rows, block_cols) > kMinBlock) {
    int64_t& larger = block_rows > block_cols ? block_rows : block_cols;
    larger = round_up(ceil_div(larger, 2), kTileQ);
  }
  if (!p.accumulate && p.c_row == p.cols) {
    advise_huge_pages(p.c, p.rows * p.cols * int64_t(sizeof(float)));
  }
  const int64_t across = ceil_div(p.cols, block_cols);
  pool.run(tasks(), [&](int64_t task) {
    [[maybe_unused]] const FlushDenormals flush;
    const Range rows =
        intersect({0, p.rows}, {task / across * block_rows, (task / across + 1) * block_rows});
    const Range cols =
        intersect({0, p.cols}, {task % across * block_cols, (task % across + 1) * block_cols});
    Scratch scratch;
    E* packed = take<E>(scratch, kAcross * kDepth);
    E* panel = take<E>(scratch, kDepth * kTileQ);
    float* spare = scratch.take(kMaxBlock * kTileQ);
    for (int64_t k = 0; k < p.depth || k == 0; k += kStep) {
      const int64_t depth = std::min(kStep, p.depth - k);
      const Matrix<TA> block{a.at + rows.begin * a.row + k * a.col, a.row, a.col};
      const Left<E> left = pack_left(block, rows.size(), depth, packed);
      for (int64_t c = cols.begin; c < cols.end; c += kTileQ) {
        const int64_t width = std::min<int64_t>(kTileQ, cols.end - c);
        pack_right(Matrix<TB>{b.at + k * b.row + c * b.col, b.row, b.col}, depth, width, panel);
        multiply_panel(left, panel, rows.size(), width, elements<E>(depth), p.accumulate || k > 0,
                       p.c + rows.begin * p.c_row + c, p.c_row, spare);
      }
    }
  });
}

}  // namespace matmul

static void matmul_in_fp32(const MatmulParams& p, const Pool& pool) {
  if (p.rows == 0 || p.cols == 0) return;
  with_dtype(p.a_dtype, [&](auto a) {
    with_dtype(p.b_dtype, [&](auto b) { matmul::run<decltype(a), decltype(b)>(p, pool); });
  });
}
