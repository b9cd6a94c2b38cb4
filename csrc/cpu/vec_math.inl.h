// Functions of a Vec built from its basic operations; the same code on every instruction set.

constexpr float kLog2E = 1.44269504088896341f;  // log2(e)
constexpr float kLn2 = 0.693147180559945309f;

FASTATTN_INLINE Vec exp(Vec a) { return exp2(a * broadcast(kLog2E)); }

// tanh within 4e-7 relative (and of 1); NaN stays NaN. x·P(x²)/Q(x²) on [-9, 9], a minimax fit with
// positive coefficients, so nothing cancels; beyond 9 the result is 1 in fp32.
FASTATTN_INLINE Vec tanh(Vec a) {
  const Vec limit = broadcast(9.0f);
  const Vec x =
      zero() - max(zero() - limit, zero() - max(zero() - limit, a));  // this order keeps a NaN
  const Vec u = x * x;
  Vec p = broadcast(1.3354352e-8f);
  p = fmadd(p, u, broadcast(2.0608852e-5f));
  p = fmadd(p, u, broadcast(3.4955740e-3f));
  p = fmadd(p, u, broadcast(1.3381013e-1f));
  p = fmadd(p, u, broadcast(1.0f));
  Vec q = broadcast(7.7764294e-7f);
  q = fmadd(q, u, broadcast(3.2856117e-4f));
  q = fmadd(q, u, broadcast(2.5876929e-2f));
  q = fmadd(q, u, broadcast(4.6714330e-1f));
  q = fmadd(q, u, broadcast(1.0f));
  return x * p / q;
}
