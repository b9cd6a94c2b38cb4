// Pairs of bf16 (AVX512-BF16), beside vec_avx512.h: operands of a dot product with fp32 sums.

struct PairVec {
  __m512bh x;
};

FASTATTN_INLINE PairVec load(const bf16x2* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
FASTATTN_INLINE void store(bf16x2* p, PairVec a) { _mm512_storeu_si512(p, (__m512i)a.x); }
FASTATTN_INLINE PairVec broadcast(bf16x2 a) {
  int32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return {(__m512bh)_mm512_set1_epi32(bits)};
}
// a.first·b.first + a.second·b.second + c; denormals are zeros.
FASTATTN_INLINE Vec fmadd(PairVec a, PairVec b, Vec c) { return {_mm512_dpbf16_ps(c.x, a.x, b.x)}; }

// 0, n, 1, n + 1, …: what interleaves 16-bit lanes.
FASTATTN_INLINE __m512i alternating(int n) {
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_set1_epi32(n << 16),
                          _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001), steps));
}

// (a, b) rounded.
FASTATTN_INLINE PairVec pairs(Vec a, Vec b) {
  return {
      (__m512bh)_mm512_permutexvar_epi16(alternating(16), (__m512i)_mm512_cvtne2ps_pbh(b.x, a.x))};
}
FASTATTN_INLINE void store_rounded(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.x));
}

// Pairs of an element of a and one of b, 0 where the masks have no lane.
template <class T>
FASTATTN_INLINE PairVec interleave(const T* a, Mask of_a, const T* b, Mask of_b) {
  return pairs(load_partial(a, of_a), load_partial(b, of_b));
}
FASTATTN_INLINE PairVec interleave(const bf16* a, Mask of_a, const bf16* b, Mask of_b) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(of_a, a));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(of_b, b));
  return {(__m512bh)_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
}
// Likewise of 32 elements each.
FASTATTN_INLINE void interleave(const bf16* a, const bf16* b, bf16x2* dst) {
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  const __m512i low = alternating(32), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(x, low, y));
  _mm512_storeu_si512(dst + 16, _mm512_permutex2var_epi16(x, high, y));
}

// The bits of 16 pairs, of which the first n elements exist; 0 beyond.
FASTATTN_INLINE Vec load_bits(const bf16* p, int64_t n) {
  if (n >= 32) return {_mm512_castsi512_ps(_mm512_loadu_si512(p))};
  const __mmask32 there = n <= 0 ? 0 : (__mmask32(1) << n) - 1;
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, p))};
}
