// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), several
// counters a call. The loops over lanes are plain C++, which the compiler vectorises.

constexpr int kPhiloxLanes = 16;

// The four words of counters (c0, c1 + lane, c2, c3) under the 64-bit key.
static void philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key,
                   uint32_t (&words)[4][kPhiloxLanes]) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int lane = 0; lane < kPhiloxLanes; lane++) {
    words[0][lane] = c0;
    words[1][lane] = c1 + uint32_t(lane);
    words[2][lane] = c2;
    words[3][lane] = c3;
  }
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; round++, key0 += kWeyl0, key1 += kWeyl1) {
    for (int lane = 0; lane < kPhiloxLanes; lane++) {
      const uint64_t product0 = kMultiplier0 * words[0][lane],
                     product1 = kMultiplier1 * words[2][lane];
      words[0][lane] = uint32_t(product1 >> 32) ^ words[1][lane] ^ key0;
      words[1][lane] = uint32_t(product1);
      words[2][lane] = uint32_t(product0 >> 32) ^ words[3][lane] ^ key1;
      words[3][lane] = uint32_t(product0);
    }
  }
}
