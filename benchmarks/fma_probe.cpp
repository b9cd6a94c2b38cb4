// The fastest a core can multiply and add in fp32: twelve chains of fused multiply-adds that stay in
// registers, enough to fill two ports of latency 4. Built by ceilings.py with -march=native.

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));
constexpr int kChains = 12;

// Returns the FLOPs done; *sum keeps the compiler from dropping them.
extern "C" double fma_probe(long rounds, float* sum) {
  Vec a[kChains];
  for (int i = 0; i < kChains; ++i) a[i] = Vec{} + float(i);
  const Vec x = Vec{} + 0.5f, y = Vec{} + *sum;
  for (long round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) a[i] = a[i] * x + y;
  }
  for (int i = 0; i < kChains; ++i) *sum += a[i][0];
  return 2.0 * kBytes / sizeof(float) * kChains * double(rounds);
}
