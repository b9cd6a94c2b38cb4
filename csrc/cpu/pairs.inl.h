// Packing of bf16 for products of pairs: see operands.inl.h.

// dst (rows, cols) = src rounded, in rows of ld; zeros behind cols up to a whole vector.
template <class T>
static void round_rows(const T* src, int64_t stride, int64_t rows, int64_t cols, bf16* dst,
                       int64_t ld) {
  for (int64_t r = 0; r < rows; r++, src += stride, dst += ld) {
    int64_t c = 0;
    if constexpr (std::is_same_v<T, bf16>) {
      c = cols / kLanes * kLanes;
      std::copy_n(src, c, dst);
    }
    for (; c < cols; c += kLanes) {
      store_rounded(dst + c, load_upto(src + c, cols - c));
    }
  }
}

// dst (⌈rows / 2⌉, cols) = src across, in rows of ld; zeros behind both, as above.
template <class T>
static void interleave_rows(const T* src, int64_t stride, int64_t rows, int64_t cols, bf16x2* dst,
                            int64_t ld) {
  for (int64_t r = 0; r < rows; r += 2, src += 2 * stride, dst += ld) {
    int64_t c = 0;
    if constexpr (std::is_same_v<T, bf16>) {
      if (r + 1 < rows) {
        for (; c + 2 * kLanes <= cols; c += 2 * kLanes) {
          interleave(src + c, src + stride + c, dst + c);
        }
      }
    }
    for (; c < cols; c += kLanes) {
      const Mask there = first_lanes(cols - c), below = r + 1 < rows ? there : first_lanes(0);
      const T* next = r + 1 < rows ? src + stride : src;
      store(dst + c, interleave(src + c, there, next + c, below));
    }
  }
}

// The ScoreOperand of pairs.
struct PairScores {
  static constexpr int64_t kStride = kTileQ / 2;
  bf16x2 *along, *across;

  explicit PairScores(Scratch& scratch)
      : along(reinterpret_cast<bf16x2*>(scratch.take(kBlockK * kStride))),
        across(reinterpret_cast<bf16x2*>(scratch.take(kBlockK * kStride))) {}

  static int64_t depth(int64_t count, int64_t first) { return (count + first % 2 + 1) / 2; }

  // `first`: the place of the first key in its block, where pairs start at even places. A key
  // without a partner here gets one of weight 0.
  template <int V>
  void pack_across(const float* scores, int64_t count, int64_t first) {
    bf16x2* dst = across;
    for (int64_t n = -(first % 2); n < count; n += 2, dst += kTileQ) {
      const float* row = scores + n * kTileQ;
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const Vec a = n < 0 ? zero() : load(row + v * kLanes);
        const Vec b = n + 1 == count ? zero() : load(row + kTileQ + v * kLanes);
        store(dst + v * kLanes, pairs(a, b));
      }
    }
  }
  // Likewise for a query without a partner: `lanes` are there.
  template <int V>
  void pack_along(const float* scores, int64_t count, int64_t lanes) {
    bf16* dst = &along->first;
    for (int64_t n = 0; n < count; n++, dst += kTileQ, scores += kTileQ) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store_rounded(dst + v * kLanes, load(scores + v * kLanes));
      if (lanes % 2 != 0) dst[lanes] = bf16{0};
    }
  }
};
