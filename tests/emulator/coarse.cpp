#include "coarse.h"

#include <algorithm>
#include <cmath>

#include "bits.h"
#include "options.h"

namespace emulator {

float approximated(float exact, int steps) {
  const uint32_t bits = float_bits(exact), mantissa = bits & 0x7fffff;
  // powers of two come out exact
  if (!options().coarse || mantissa == 0 || !std::isfinite(exact)) return exact;
  const bool down = (mantissa * 0x9e3779b1u) >> 31;
  return bit_float(down ? bits - steps : bits + steps);
}

float coarse_sum(float sum, const float* a, const float* b, int stride, int count) {
  float plain = sum;
  double largest = std::fabs(sum);
  for (int i = 0; i < count; ++i) {
    const double product = double(a[i]) * b[i * stride];
    plain += static_cast<float>(product);
    largest = std::max(largest, std::fabs(product));
  }
  if (largest == 0 || !std::isfinite(plain)) return plain;
  const auto cut = [](double x, int exponent) {  // to 24 bits, the first of which is 2^exponent
    return std::ldexp(std::trunc(std::ldexp(x, 23 - exponent)), exponent - 23);
  };
  const int exponent = std::ilogb(largest);
  double total = cut(sum, exponent);
  for (int i = 0; i < count; ++i) total += cut(double(a[i]) * b[i * stride], exponent);
  return total == 0 ? 0.0f : static_cast<float>(cut(total, std::ilogb(total)));
}

}  // namespace emulator
