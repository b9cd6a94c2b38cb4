// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include "elements.cuh"

namespace fastattn::cuda {

// The four words of a counter under the 64-bit key.
FASTATTN_DEVICE void philox(uint32_t (&words)[4], uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    // Each pair is one wide multiplication; as a 64-bit product, ptxas adds zeros to its high word.
    const uint32_t low0 = 0xD2511F53 * words[0], high0 = __umulhi(0xD2511F53, words[0]);
    const uint32_t low1 = 0xCD9E8D57 * words[2], high1 = __umulhi(0xCD9E8D57, words[2]);
    words[0] = high1 ^ words[1] ^ key0;
    words[1] = low1;
    words[2] = high0 ^ words[3] ^ key1;
    words[3] = low0;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

}  // namespace fastattn::cuda
