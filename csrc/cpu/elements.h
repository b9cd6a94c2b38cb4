// Storage types of tensor elements and their scalar conversions to and from fp32 (round to nearest
// even).
#pragma once

#include <cstdint>
#include <cstring>

#include "../params.h"

namespace fastattn::cpu {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct bf16x2 {  // neighbours, as dot products of bf16 take them
  bf16 first, second;
};

inline float bit_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_float(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00)
    return bit_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  // Shift the exponent up by 2⁻¹¹² instead of branching on denormals: the multiply renormalises
  // them.
  return bit_float(sign | float_bits(bit_float(magnitude << 13) * 0x1p112f));
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  const uint32_t bits = float_bits(x);
  if (x != x) {
    out->bits = uint16_t(bits >> 16 | 0x40);  // keep it a NaN
    return;
  }
  out->bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, fp16* out) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // 65520 and up rounds to infinity
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2⁻¹⁴: adding 0.5 aligns the fp16 denormal at the
                                        // last mantissa bits
    out->bits = uint16_t(sign | (float_bits(bit_float(magnitude) + 0.5f) - 0x3f000000));
  } else {
    out->bits = uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1)) - 0x38000000) >> 13);
  }
}

}  // namespace fastattn::cpu
