// Functions of a Vec built from its basic operations; the same code on every instruction set.

constexpr float kLog2E = 1.44269504088896341f;  // log2(e)
constexpr float kLn2 = 0.693147180559945309f;

FASTATTN_INLINE Vec exp(Vec a) { return exp2(a * broadcast(kLog2E)); }

// tanh within 2e-7 relative, never beyond ±1; NaN stays NaN. Up to |x| = 0.8 an odd polynomial
// (minimax), then 1 − 2t / (1 + t) with t = exp(−2|x|), whose error shrinks with t.
FASTATTN_INLINE Vec tanh(Vec x) {
  const Vec u = x * x;
  Vec p = broadcast(1.5847563e-3f);
  p = fmadd(p, u, broadcast(-7.4095576e-3f));
  p = fmadd(p, u, broadcast(2.1302991e-2f));
  p = fmadd(p, u, broadcast(-5.3852331e-2f));
  p = fmadd(p, u, broadcast(1.3332221e-1f));
  p = fmadd(p, u, broadcast(-3.3333299e-1f));
  const Vec near_zero = fmadd(x * u, p, x);

  const Vec one = broadcast(1.0f), edge = broadcast(0.8f);
  const Vec magnitude = max(zero() - x, x);
  const Vec t = exp(broadcast(-2.0f) * magnitude);
  const Vec positive = one - (t + t) / (one + t);
  const Vec far = select(equal(magnitude, x), positive, zero() - positive);
  return select(equal(max(magnitude, edge), edge), near_zero, far);
}
