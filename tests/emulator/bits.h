// fp32 to and from the 16-bit formats, rounding to nearest even, in integer arithmetic: the same
// bits on every machine.
#pragma once

#include <cstdint>
#include <cstring>

#define EMULATOR_INLINE inline __attribute__((always_inline))

namespace emulator {

EMULATOR_INLINE float bit_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
EMULATOR_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

EMULATOR_INLINE float bf16_to_float(uint16_t x) { return bit_float(uint32_t(x) << 16); }
EMULATOR_INLINE float fp16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = x & 0x7fff;
  if (magnitude >= 0x7c00) return bit_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shift the exponent up by a multiplication with 2^112, which renormalises denormals.
  return bit_float(sign | float_bits(bit_float(magnitude << 13) * 0x1p112f));
}

// NaN becomes 0x7fff, as cvt.rn gives it.
EMULATOR_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
EMULATOR_INLINE uint16_t float_to_fp16(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and up
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 aligns fp16's denormal at the last bits
    return uint16_t(sign | (float_bits(bit_float(magnitude) + 0.5f) - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1)) - 0x38000000) >> 13);
}

}  // namespace emulator
