// What the rungs of the ladder share, which is all but attention: the problem, and the door through
// which ladder.py starts them, on a GPU or in the emulator.
//
// A rung defines kSharedBytes<kHeadDim>, of a block, and forward<kHeadDim>(problem, device), for
// head dims 64 and 128, and ends with LADDER_RUNG(element type). Of the package it uses PTX
// instructions as functions (csrc/cuda/ptx.cuh), `launch`, and for TMA what makes a tensor's map;
// no part of its kernels.
#pragma once

#include <exception>
#include <string>

#include "../block_range.h"
#include "launch.cuh"
#include "ptx.cuh"

namespace ladder {

using namespace fastattn::cuda;
using fastattn::ceil_div;

// out = softmax(scale · QKᵀ) V of each head: (heads, seqlen, head_dim), contiguous; heads are those
// of all batches.
template <class T>
struct Attention {
  const T *q, *k, *v;
  T* out;
  float* workspace;  // (heads, seqlen, seqlen), for the rung that writes its scores
  int heads, seqlen;
  float scale;  // head_dim^-½
};

// Over the four lanes that share a row of a product's accumulators.
FASTATTN_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
FASTATTN_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

template <int kHeadDim, class T>
void forward(const Attention<T>& a, const Device& device);

// Null, or what went wrong.
template <class T>
const char* enter(Attention<T> a, int head_dim, const Device& device) {
  static std::string problem;
  try {
    if (head_dim == 64) {
      a.scale = 0.125f;
      forward<64>(a, device);
    } else {
      a.scale = 0.08838834764831845f;
      forward<128>(a, device);
    }
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
  return nullptr;
}

// At the end of a rung, inside the namespace.
#define LADDER_RUNG(T)                                                                         \
  extern "C" const char* ladder_forward(const T* q, const T* k, const T* v, T* out,            \
                                        float* workspace, int heads, int seqlen, int head_dim, \
                                        int multiprocessors, void* stream) {                   \
    return enter<T>({q, k, v, out, workspace, heads, seqlen, 0.0f}, head_dim,                  \
                    {0, multiprocessors, 0, stream});                                          \
  }                                                                                            \
  extern "C" int ladder_shared_bytes(int head_dim) {                                           \
    return head_dim == 64 ? kSharedBytes<64> : kSharedBytes<128>;                              \
  }                                                                                            \
  static_assert(true)

}  // namespace ladder
