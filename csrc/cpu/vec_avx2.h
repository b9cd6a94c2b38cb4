// Vec: 8 fp32 lanes (AVX2, FMA, F16C). Included inside namespace avx2 and its target region. Same
// names in every vec_*.h.
#define FASTATTN_INLINE inline __attribute__((always_inline))

struct Vec {
  static constexpr int kLanes = 8;
  __m256 x;
};
struct Mask {
  __m256i x;  // all ones in a chosen lane
  int lanes;  // how many of the first lanes are chosen, for the 16-bit types that have no masked
              // load
};

FASTATTN_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
FASTATTN_INLINE Vec broadcast(float a) { return {_mm256_set1_ps(a)}; }
FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.x, b.x)}; }
FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.x, b.x)}; }
FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.x, b.x)}; }
// a·b + c
FASTATTN_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }
// b where either is NaN
FASTATTN_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.x, b.x)}; }
FASTATTN_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FASTATTN_INLINE float max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.x), _mm256_extractf128_ps(a.x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

FASTATTN_INLINE Mask first_lanes(int64_t n) {  // lanes 0 … n - 1; any n
  const int lanes = n < 0 ? 0 : n > 8 ? 8 : int(n);
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), index), lanes};
}
FASTATTN_INLINE Mask equal(Vec a, Vec b) {  // false at NaN; for select alone
  return {_mm256_castps_si256(_mm256_cmp_ps(a.x, b.x, _CMP_EQ_OQ)), 0};
}
FASTATTN_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.x, yes.x, _mm256_castsi256_ps(m.x))};
}

FASTATTN_INLINE Vec widen(const bf16*, __m128i half) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
FASTATTN_INLINE Vec widen(const fp16*, __m128i half) { return {_mm256_cvtph_ps(half)}; }
// Rounded to bf16 in the upper half of each lane; the lower half is rubbish.
FASTATTN_INLINE __m256i round_to_upper_half(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan =
      _mm256_cmp_ps(a.x, a.x, _CMP_UNORD_Q);  // rounding could carry a NaN into infinity
  return _mm256_castps_si256(_mm256_blendv_ps(
      _mm256_castsi256_ps(rounded), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan));
}
FASTATTN_INLINE __m128i narrow(const bf16*, Vec a) {
  const __m256i rounded = _mm256_srli_epi32(round_to_upper_half(a), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
FASTATTN_INLINE __m128i narrow(const fp16*, Vec a) {
  return _mm256_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT);
}

FASTATTN_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
template <class Half>
FASTATTN_INLINE Vec load(const Half* p) {
  return widen(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// 0 elsewhere
FASTATTN_INLINE Vec load_partial(const float* p, Mask m) { return {_mm256_maskload_ps(p, m.x)}; }
template <class Half>
FASTATTN_INLINE Vec load_partial(const Half* p, Mask m) {
  alignas(16) uint16_t lanes[8] = {};
  for (int i = 0; i < m.lanes; i++) lanes[i] = p[i].bits;
  return widen(p, _mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
}
FASTATTN_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.x); }
template <class Half>
FASTATTN_INLINE void store(Half* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, a));
}
FASTATTN_INLINE void store_partial(float* p, Vec a, Mask m) { _mm256_maskstore_ps(p, m.x, a.x); }
template <class Half>
FASTATTN_INLINE void store_partial(Half* p, Vec a, Mask m) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), narrow(p, a));
  for (int i = 0; i < m.lanes; i++) p[i].bits = lanes[i];
}
// Past the caches, for outputs nobody reads soon; p is 32-byte aligned (16 for 16-bit types). Ends
// with stream_fence().
FASTATTN_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.x); }
template <class Half>
FASTATTN_INLINE void stream(Half* p, Vec a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(p, a));
}
FASTATTN_INLINE void stream_fence() { _mm_sfence(); }

// 16 consecutive elements, in an order that depends on their type and that store_pair undoes: bf16
// goes to even and odd ones, which costs no shuffles.
struct Pair {
  Vec a, b;
};
template <class T>
FASTATTN_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + 8)};
}
FASTATTN_INLINE Pair load_pair(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000))))}};
}
FASTATTN_INLINE __m256i interleave_bf16(Pair x) {
  const __m256i even = _mm256_srli_epi32(round_to_upper_half(x.a), 16);
  return _mm256_blend_epi16(even, round_to_upper_half(x.b), 0xaa);
}
template <class T>
FASTATTN_INLINE void store_pair(T* p, Pair x) {
  store(p, x.a);
  store(p + 8, x.b);
}
FASTATTN_INLINE void store_pair(bf16* p, Pair x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), interleave_bf16(x));
}
template <class T>
FASTATTN_INLINE void stream_pair(T* p, Pair x) {  // p is 32-byte aligned
  stream(p, x.a);
  stream(p + 8, x.b);
}
FASTATTN_INLINE void stream_pair(bf16* p, Pair x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), interleave_bf16(x));
}
// Not _mm_prefetch: GCC takes a function that does nothing else to have no effect, and leaves out
// calls of it.
FASTATTN_INLINE void prefetch_l1(const void* p) { asm volatile("prefetcht0 (%0)" : : "r"(p)); }
FASTATTN_INLINE void prefetch_l2(const void* p) { asm volatile("prefetcht1 (%0)" : : "r"(p)); }

// 2^x within 1e-7 relative for |x| ≤ 126, 0 below; NaN stays NaN. Degree 5 on [-½, ½] (minimax),
// exponent added as an integer.
FASTATTN_INLINE Vec exp2(Vec a) {
  const Vec clamped = max(broadcast(-127.0f), a);  // this order keeps a NaN
  const Vec magic =
      broadcast(12582912.0f);  // 1.5 · 2²³: adding it rounds to an integer in the low mantissa bits
  const Vec shifted = clamped + magic;
  const Vec r = clamped - (shifted - magic);
  Vec p = broadcast(0.0013276472454890609f);
  p = fmadd(p, r, broadcast(0.009675540961325169f));
  p = fmadd(p, r, broadcast(0.05550713092088699f));
  p = fmadd(p, r, broadcast(0.24022120237350464f));
  p = fmadd(p, r, broadcast(0.6931469440460205f));
  p = fmadd(p, r, broadcast(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted.x), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.x), exponent))};
}

// Rows become columns.
FASTATTN_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i].x, r[2 * i + 1].x);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i].x, r[2 * i + 1].x);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    r[4 * i].x = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1].x = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2].x = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3].x = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2f128_ps(r[i].x, r[4 + i].x, 0x20);
    t[4 + i] = _mm256_permute2f128_ps(r[i].x, r[4 + i].x, 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i].x = t[i];
}

// Lane i = sum(r[i]).
FASTATTN_INLINE Vec sums(const Vec (&r)[8]) {
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(r[0].x, r[1].x), _mm256_hadd_ps(r[2].x, r[3].x));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(r[4].x, r[5].x), _mm256_hadd_ps(r[6].x, r[7].x));
  return {_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31))};
}

// Denormal probabilities cost up to 3× in FMA loops: flush them for the life of this guard, on this
// thread.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // FTZ | DAZ
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};
