// What csrc/bindings.cpp starts on a GPU. Plain C++: no CUDA or torch types.
//
// A kernel allocates nothing: where it needs scratch, *_workspace says how many bytes, and the
// caller hands in as many on the device (aligned to 256). Errors of a launch are thrown as
// std::runtime_error and name the kernel and its shape.
#pragma once

#include <cstdint>

#include "../params.h"

namespace fastattn::cuda {

// The device a launch goes to, and what of it decides tiles and splits.
struct Device {
  int arch;             // compute capability · 10: 75, 80, 86, 89, 90, 100, 120
  int multiprocessors;  // SMs
  int shared_bytes;     // shared memory a block may ask for
  void* stream;         // cudaStream_t
};

// GPU number `index`, made current for what is launched next. Throws std::runtime_error where there
// is none. In the emulator: the one that FASTATTN_EMULATE_ARCH names, sm_80 by default.
Device device(int index, void* stream);

int64_t attn_fwd_workspace(const AttnFwdParams& p, const Device& device);
void attn_fwd(const AttnFwdParams& p, void* workspace, const Device& device);

void attn_entropy(const AttnEntropyParams& p, const Device& device);

int64_t attn_bwd_workspace(const AttnBwdParams& p, const Device& device);
void attn_bwd(const AttnBwdParams& p, void* workspace, const Device& device);

// Mask, bias and dropout are taken in 16 bits, aligned, up to head dim 128.
bool attn_decode_takes(const AttnDecodeParams& p, const Device& device);
int64_t attn_decode_workspace(const AttnDecodeParams& p, const Device& device);
void attn_decode(const AttnDecodeParams& p, void* workspace, const Device& device);

void cache_append(const CacheAppendParams& p, const Device& device);

void cross_entropy_fwd(const CrossEntropyParams& p, const Device& device);
void cross_entropy_bwd(const CrossEntropyParams& p, const Device& device);

}  // namespace fastattn::cuda
