// Vec: 16 fp32 lanes (AVX-512 F/BW/DQ/VL). Included inside namespace avx512 and its target region.
// Same names in every vec_*.h.
#define FASTATTN_INLINE inline __attribute__((always_inline))

struct Vec {
  static constexpr int kLanes = 16;
  __m512 x;
};
using Mask = __mmask16;

FASTATTN_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
FASTATTN_INLINE Vec broadcast(float a) { return {_mm512_set1_ps(a)}; }
FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.x, b.x)}; }
FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.x, b.x)}; }
FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.x, b.x)}; }
// a·b + c
FASTATTN_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
// b where either is NaN
FASTATTN_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.x, b.x)}; }
FASTATTN_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.x); }
FASTATTN_INLINE float max(Vec a) { return _mm512_reduce_max_ps(a.x); }

FASTATTN_INLINE Mask first_lanes(int64_t n) {  // lanes 0 … n - 1; any n
  return n <= 0 ? Mask(0) : n >= 16 ? Mask(0xffff) : Mask((1u << n) - 1);
}
// false at NaN
FASTATTN_INLINE Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_EQ_OQ); }
FASTATTN_INLINE Vec select(Mask m, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(m, no.x, yes.x)};
}

FASTATTN_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FASTATTN_INLINE Vec load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
FASTATTN_INLINE Vec load(const fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// 0 elsewhere
FASTATTN_INLINE Vec load_partial(const float* p, Mask m) { return {_mm512_maskz_loadu_ps(m, p)}; }
FASTATTN_INLINE Vec load_partial(const bf16* p, Mask m) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16))};
}
FASTATTN_INLINE Vec load_partial(const fp16* p, Mask m) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p))};
}

// Rounded to bf16 in the upper half of each lane; the lower half is rubbish.
FASTATTN_INLINE __m512i round_to_upper_half(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const Mask nan =
      _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);  // rounding could carry a NaN into infinity
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
FASTATTN_INLINE __m256i round_to_bf16(Vec a) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_upper_half(a), 16));
}
FASTATTN_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.x); }
FASTATTN_INLINE void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(a));
}
FASTATTN_INLINE void store(fp16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}
FASTATTN_INLINE void store_partial(float* p, Vec a, Mask m) { _mm512_mask_storeu_ps(p, m, a.x); }
FASTATTN_INLINE void store_partial(bf16* p, Vec a, Mask m) {
  _mm256_mask_storeu_epi16(p, m, round_to_bf16(a));
}
FASTATTN_INLINE void store_partial(fp16* p, Vec a, Mask m) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}
// Past the caches, for outputs nobody reads soon; p is 64-byte aligned (32 for 16-bit types). Ends
// with stream_fence().
FASTATTN_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.x); }
FASTATTN_INLINE void stream(bf16* p, Vec a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(a));
}
FASTATTN_INLINE void stream(fp16* p, Vec a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.x, _MM_FROUND_TO_NEAREST_INT));
}
FASTATTN_INLINE void stream_fence() { _mm_sfence(); }

// 32 consecutive elements, in an order that depends on their type and that store_pair undoes: bf16
// goes to even and odd ones, which costs no shuffles.
struct Pair {
  Vec a, b;
};
template <class T>
FASTATTN_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + 16)};
}
FASTATTN_INLINE Pair load_pair(const bf16* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))))}};
}
FASTATTN_INLINE __m512i interleave_bf16(Pair x) {
  const __m512i even = _mm512_srli_epi32(round_to_upper_half(x.a), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, even, round_to_upper_half(x.b));
}
template <class T>
FASTATTN_INLINE void store_pair(T* p, Pair x) {
  store(p, x.a);
  store(p + 16, x.b);
}
FASTATTN_INLINE void store_pair(bf16* p, Pair x) { _mm512_storeu_si512(p, interleave_bf16(x)); }
template <class T>
FASTATTN_INLINE void stream_pair(T* p, Pair x) {  // p is 64-byte aligned
  stream(p, x.a);
  stream(p + 16, x.b);
}
FASTATTN_INLINE void stream_pair(bf16* p, Pair x) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), interleave_bf16(x));
}
// Not _mm_prefetch: GCC takes a function that does nothing else to have no effect, and leaves out
// calls of it.
FASTATTN_INLINE void prefetch_l1(const void* p) { asm volatile("prefetcht0 (%0)" : : "r"(p)); }
FASTATTN_INLINE void prefetch_l2(const void* p) { asm volatile("prefetcht1 (%0)" : : "r"(p)); }

// 2^x within 1e-7 relative for x ≤ 127; 2^-inf = 0; NaN stays NaN. Degree 5 on [0, 1) (minimax),
// scaled by scalef.
FASTATTN_INLINE Vec exp2(Vec a) {
  const Vec r{_mm512_reduce_ps(a.x, 0x09)};  // a - floor(a)
  Vec p = broadcast(0.0018775766948238015f);
  p = fmadd(p, r, broadcast(0.00898933969438076f));
  p = fmadd(p, r, broadcast(0.05582631751894951f));
  p = fmadd(p, r, broadcast(0.24015361070632935f));
  p = fmadd(p, r, broadcast(0.6931530833244324f));
  p = fmadd(p, r, broadcast(1.0f));
  return {_mm512_scalef_ps(p.x, a.x)};
}

// Rows become columns.
FASTATTN_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i].x, r[2 * i + 1].x);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i].x, r[2 * i + 1].x);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i].x = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    r[4 * i + 1].x = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    r[4 * i + 2].x = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    r[4 * i + 3].x = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i].x, r[4 + i].x, 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i].x, r[4 + i].x, 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i].x, r[12 + i].x, 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i].x, r[12 + i].x, 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i].x = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i].x = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i].x = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i].x = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

FASTATTN_INLINE __m512 add_halves(__m512 a,
                                  __m512 b) {  // 128-bit lanes: a0+a1, a2+a3, b0+b1, b2+b3
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
// Lane i = sum(r[i]), by a tree that adds parts of two vectors into one.
FASTATTN_INLINE Vec sums(const Vec (&r)[16]) {
  __m512 t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i].x, r[2 * i + 1].x),
                         _mm512_unpackhi_ps(r[2 * i].x, r[2 * i + 1].x));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    t[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  return {add_halves(add_halves(t[0], t[1]), add_halves(t[2], t[3]))};
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
