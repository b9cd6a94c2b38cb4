// Elements in memory, floats in registers: conversions, and what 16 bytes hold of each type.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace fastattn::cuda {

template <class T>
constexpr int kVec = 16 / int(sizeof(T));  // elements of a 16-byte access

FASTATTN_DEVICE float to_float(float x) { return x; }
FASTATTN_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FASTATTN_DEVICE float to_float(fp16 x) { return ptx::to_float(x); }

// Rounded to nearest even.
template <class T>
FASTATTN_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return T{uint16_t(ptx::pack(x, 0.0f, T{}))};
  }
}

// e^x where x is a difference: of x·log2e − max·log2e nothing would be left at a large offset.
FASTATTN_DEVICE float exp_of(float difference) {
  return ptx::ex2(difference * 1.4426950408889634f);
}

template <class T>
FASTATTN_DEVICE void unpack(const uint4& v, float (&x)[kVec<T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = __uint_as_float(words[i]);
    } else {
      x[2 * i] = to_float(T{uint16_t(words[i])});
      x[2 * i + 1] = to_float(T{uint16_t(words[i] >> 16)});
    }
  }
}

template <class T>
FASTATTN_DEVICE uint4 pack(const float (&x)[kVec<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = ptx::pack(x[2 * i], x[2 * i + 1], T{});
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Bytes from `x` back to the last address that 16-byte accesses may start at.
FASTATTN_DEVICE int misalignment(const void* x) { return int(reinterpret_cast<uintptr_t>(x) % 16); }

template <class T>
FASTATTN_DEVICE uint4 load_vector(const T* x) {
  return *reinterpret_cast<const uint4*>(x);
}
template <class T>
FASTATTN_DEVICE void store_vector(T* x, const uint4& v) {
  *reinterpret_cast<uint4*>(x) = v;
}

// Calls f(T{}) for the element type of a dtype.
template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kBF16:
      return f(bf16{});
    case DType::kF16:
      return f(fp16{});
  }
}

}  // namespace fastattn::cuda
