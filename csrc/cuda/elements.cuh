// The language a kernel is written in, and the types of tensor elements.
//
// The same sources are compiled by nvcc and, for tests, by g++ with FASTATTN_EMULATE, where
// tests/emulator has CUDA's names: __global__, threadIdx, __syncthreads, __shfl_xor_sync, uint4 …
#pragma once

#include <cstdint>

#include "../params.h"

#ifdef FASTATTN_EMULATE
#include "emulated_cuda.h"  // also FASTATTN_SHARED
#else
// The block's dynamic shared memory, as bytes.
#define FASTATTN_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

#define FASTATTN_DEVICE __device__ __forceinline__

namespace fastattn::cuda {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace fastattn::cuda
