// C (+)= A·B in fp32, the matrix products of linear cross-entropy. A, B are fp32, bf16 or fp16,
// each with either of its dimensions contiguous; where bf16 goes in pairs, B bf16 makes A bf16 too.
//
// A task owns a block of C. It packs its rows of A, as deep as L2 has room for, and one after
// another panels of kTileQ columns of B, kDepth deep, which stay in L1 (Goto & van de Geijn,
// "Anatomy of high-performance matrix multiplication", 2008). Columns of C take all of that depth
// before the next ones, and what will be packed next is prefetched meanwhile.
namespace matmul {

constexpr int64_t kDepth = 128;  // elements: a panel of B is 32 KB with AVX-512
// Rows and columns of a block of C: kMaxBlock × kDepth elements of A are 512 KB.
constexpr int64_t kMaxBlock = 1024;
constexpr int64_t kMinBlock = 2 * kTileQ;
// Fewer rows, where there are as many, would make too much of packing B. Pairs are through with
// them in half the time, so that they take fewer and prefetch more often (on Zen 5, 512 rows and
// slices of 32 are 2 % faster in linear cross-entropy than 256 and 16).
template <class E>
constexpr int64_t kEnoughRows = kPairs<E> ? 512 : kMaxBlock;
template <class E>
constexpr int64_t kSliceRows = kPairs<E> ? 32 : 64;  // of C, between bursts of prefetching

template <class T>
struct Matrix {
  const T* at;
  int64_t rows, cols;
  int64_t row, col;  // strides; one of them is 1

  // Rows from r and columns from c on, as many as there are of those wanted.
  Matrix part(int64_t r, int64_t rows_wanted, int64_t c, int64_t cols_wanted) const {
    const int64_t some_rows = std::clamp<int64_t>(rows - r, 0, rows_wanted);
    const int64_t some_cols = std::clamp<int64_t>(cols - c, 0, cols_wanted);
    return {at + r * row + c * col, some_rows, some_cols, row, col};
  }
};

// A task's rows and columns of C, and how many times kDepth elements of A it packs at once.
struct Blocks {
  int64_t rows, cols, steps;
};

template <class E>
static Blocks choose_blocks(int64_t rows, int64_t cols, int64_t steps, int threads) {
  // As few rows as let L2 hold A's whole depth, so that C is met once.
  const int64_t fit = std::max(kEnoughRows<E>, kMaxBlock / steps / kTileQ * kTileQ);
  Blocks b{std::min(rows, fit), std::min(cols, kMaxBlock), 1};
  const auto tasks = [&] { return ceil_div(rows, b.rows) * ceil_div(cols, b.cols); };
  while (tasks() < 2 * threads && std::max(b.rows, b.cols) > kMinBlock) {
    int64_t& larger = b.rows > b.cols ? b.rows : b.cols;
    larger = round_up(ceil_div(larger, 2), kTileQ);
  }
  b.steps = std::clamp<int64_t>(kMaxBlock / round_up(b.rows, kTileQ), 1, steps);
  return b;
}

// Has part `part` of `parts` of a matrix on its way.
template <class T>
static void prefetch(const Matrix<T>& m, int64_t part, int64_t parts) {
  const bool by_row = m.col == 1;
  const int64_t lines = by_row ? m.rows : m.cols, stride = by_row ? m.row : m.col;
  const int64_t length = by_row ? m.cols : m.rows;
  for (int64_t l = part * lines / parts; l < (part + 1) * lines / parts; l++) {
    for (int64_t i = 0; i < length; i += 64 / sizeof(T)) prefetch_soon(m.at + l * stride + i);
  }
}

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

// Some of A, no deeper than a step: rows of kDepth elements, or across, `ld` apart.
template <class E, class T>
static void pack_left(const Matrix<T>& a, E* dst, int64_t ld) {
  if constexpr (kPairs<E>) {
    if (a.col == 1) {
      round_rows(a.at, a.row, a.rows, a.cols, &dst->first, 2 * kDepth);
    } else {
      interleave_rows(a.at, a.col, a.cols, a.rows, dst, ld);
    }
  } else {
    if (a.col == 1) {
      pack_lines(a.at, a.row, a.rows, a.cols, dst, kDepth);
    } else {
      pack_lines(a.at, a.col, a.cols, a.rows, dst, ld);
    }
  }
}

// Some of B, no deeper than a step and at most kTileQ wide, in rows of kTileQ.
template <class E, class T>
static void pack_right(const Matrix<T>& b, E* dst) {
  if (b.row == 1) {
    pack_queries(b.at, b.col, b.cols, b.rows, 1.0f, dst);
  } else if constexpr (kPairs<E>) {
    interleave_rows(b.at, b.row, b.rows, b.cols, dst, kTileQ);
  } else {
    pack_lines(b.at, b.row, b.rows, b.cols, dst, kTileQ);
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
      multiply<V>(rows, depth, left, panel, kTileQ, out, ld, AddFar{});
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
  const Matrix<TA> all_left{static_cast<const TA*>(p.a), p.rows, p.depth, p.a_row, p.a_col};
  const Matrix<TB> all_right{static_cast<const TB*>(p.b), p.depth, p.cols, p.b_row, p.b_col};
  const int64_t all_steps = std::max<int64_t>(1, ceil_div(p.depth, kStep));
  const Blocks blocks = choose_blocks<E>(p.rows, p.cols, all_steps, pool.threads());
  const int64_t across = ceil_div(p.cols, blocks.cols);
  // Rows packed across are met a few elements at a time: a power of two apart, they would share
  // few sets of L1.
  const int64_t ld = round_up(blocks.rows, kLanes) + 16;
  if (!p.accumulate && p.c_row == p.cols) {
    advise_huge_pages(p.c, p.rows * p.cols * int64_t(sizeof(float)));
  }
  pool.run(ceil_div(p.rows, blocks.rows) * across, [&](int64_t task) {
    [[maybe_unused]] const FlushDenormals flush;
    const int64_t row = task / across * blocks.rows, col = task % across * blocks.cols;
    Scratch scratch;
    E* packed = take<E>(scratch, blocks.steps * kDepth * ld);
    E* panel = take<E>(scratch, kDepth * kTileQ);
    float* spare = scratch.take(kSliceRows<E> * kTileQ);
    const auto left_at = [&](int64_t k) {
      return all_left.part(row, blocks.rows, k, blocks.steps * kStep);
    };
    const auto right_at = [&](int64_t k) {
      return all_right.part(k, blocks.steps * kStep, col, blocks.cols);
    };
    for (int64_t k = 0; k < p.depth || k == 0; k += blocks.steps * kStep) {
      const Matrix<TA> left = left_at(k), next_left = left_at(k + blocks.steps * kStep);
      const Matrix<TB> right = right_at(k), next_right = right_at(k + blocks.steps * kStep);
      const int64_t steps = std::max<int64_t>(1, ceil_div(left.cols, kStep));
      for (int64_t s = 0; s < steps; s++) {
        pack_left(left.part(0, left.rows, s * kStep, kStep), packed + s * kDepth * ld, ld);
      }
      const int64_t slices = ceil_div(left.rows, kSliceRows<E>);
      const int64_t turns = ceil_div(right.cols, kTileQ) * steps;
      const auto panel_of = [&](int64_t turn) {
        return right.part(turn % steps * kStep, kStep, turn / steps * kTileQ, kTileQ);
      };
      for (int64_t turn = 0; turn < turns; turn++) {
        const Matrix<TB> here = panel_of(turn);
        const Matrix<TB> next =
            turn + 1 < turns ? panel_of(turn + 1) : next_right.part(0, kStep, 0, kTileQ);
        pack_right(here, panel);
        const E* from = packed + turn % steps * kDepth * ld;
        float* c = p.c + row * p.c_row + col + turn / steps * kTileQ;
        for (int64_t slice = 0; slice < slices; slice++) {
          prefetch(next, slice, slices);
          prefetch(next_left, turn * slices + slice, turns * slices);
          const int64_t r = slice * kSliceRows<E>;
          const Left<E> rows =
              left.col == 1 ? Left<E>{from + r * kDepth, kDepth, 1} : Left<E>{from + r, 1, ld};
          multiply_panel(rows, panel, std::min(kSliceRows<E>, left.rows - r), here.cols,
                         elements<E>(here.rows), p.accumulate || k > 0 || turn % steps > 0,
                         c + r * p.c_row, p.c_row, spare);
        }
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
