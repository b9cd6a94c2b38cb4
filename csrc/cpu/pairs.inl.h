// Packing of bf16 for products of pairs: see operands.inl.h.

// dst (rows, padded(cols)) = src, with zeros behind cols.
static void copy_rows(const bf16* src, int64_t stride, int64_t rows, int64_t cols, bf16* dst) {
  for (int64_t r = 0; r < rows; r++, src += stride, dst += padded(cols)) {
    std::fill_n(std::copy_n(src, cols, dst), padded(cols) - cols, bf16{0});
  }
}

// dst (⌈rows / 2⌉, padded(cols)) = src across, with zeros behind both.
static void interleave_rows(const bf16* src, int64_t stride, int64_t rows, int64_t cols,
                            bf16x2* dst) {
  for (int64_t r = 0; r < rows; r += 2, src += 2 * stride, dst += padded(cols)) {
    for (int64_t c = 0; c < padded(cols); c += kLanes) {
      const Mask there = first_lanes(cols - c), below = r + 1 < rows ? there : first_lanes(0);
      const bf16* next = r + 1 < rows ? src + stride : src;
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
