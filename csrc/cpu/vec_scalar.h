// Vec: one fp32 lane, in plain C++. The portable fallback. Included inside namespace scalar. Same
// names in every vec_*.h.
#define FASTATTN_INLINE inline __attribute__((always_inline))

struct Vec {
  static constexpr int kLanes = 1;
  float x;
};
using Mask = bool;

FASTATTN_INLINE Vec zero() { return {0.0f}; }
FASTATTN_INLINE Vec broadcast(float a) { return {a}; }
FASTATTN_INLINE Vec operator+(Vec a, Vec b) { return {a.x + b.x}; }
FASTATTN_INLINE Vec operator-(Vec a, Vec b) { return {a.x - b.x}; }
FASTATTN_INLINE Vec operator*(Vec a, Vec b) { return {a.x * b.x}; }
FASTATTN_INLINE Vec operator/(Vec a, Vec b) { return {a.x / b.x}; }
FASTATTN_INLINE Vec fmadd(Vec a, Vec b,
                          Vec c) {  // a product is exact in double: rounded once, as if fused
  return {float(double(a.x) * b.x + c.x)};
}
FASTATTN_INLINE Vec max(Vec a, Vec b) { return {a.x > b.x ? a.x : b.x}; }  // b where either is NaN
FASTATTN_INLINE float sum(Vec a) { return a.x; }
FASTATTN_INLINE float max(Vec a) { return a.x; }

FASTATTN_INLINE Mask first_lanes(int64_t n) { return n > 0; }
FASTATTN_INLINE Mask equal(Vec a, Vec b) { return a.x == b.x; }
FASTATTN_INLINE Vec select(Mask m, Vec yes, Vec no) { return m ? yes : no; }

template <class T>
FASTATTN_INLINE Vec load(const T* p) {
  return {to_float(*p)};
}
template <class T>
FASTATTN_INLINE Vec load_partial(const T* p, Mask m) {
  return m ? load(p) : zero();
}
template <class T>
FASTATTN_INLINE void store(T* p, Vec a) {
  from_float(a.x, p);
}
template <class T>
FASTATTN_INLINE void store_partial(T* p, Vec a, Mask m) {
  if (m) store(p, a);
}
template <class T>
FASTATTN_INLINE void stream(T* p, Vec a) {
  store(p, a);
}
FASTATTN_INLINE void stream_fence() {}

struct Pair {
  Vec a, b;
};
template <class T>
FASTATTN_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + 1)};
}
template <class T>
FASTATTN_INLINE void store_pair(T* p, Pair x) {
  store(p, x.a);
  store(p + 1, x.b);
}
template <class T>
FASTATTN_INLINE void stream_pair(T* p, Pair x) {
  store_pair(p, x);
}
FASTATTN_INLINE void prefetch_l1(const void*) {}
FASTATTN_INLINE void prefetch_l2(const void*) {}

FASTATTN_INLINE Vec exp2(Vec a) { return {std::exp2(a.x)}; }
FASTATTN_INLINE void transpose(Vec (&)[1]) {}
FASTATTN_INLINE Vec sums(const Vec (&r)[1]) { return r[0]; }

class FlushDenormals {
 public:
  FlushDenormals() {}  // not trivial: an unused one is no warning
};
