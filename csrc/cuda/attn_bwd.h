// Attention's backward by architecture: what attn_bwd.cu chooses from.
#pragma once

#include "kernels.h"

namespace fastattn::cuda {

void attn_bwd_fp32(const AttnBwdParams& b, void* workspace, const Device& device);
void attn_bwd_sm75(const AttnBwdParams& b, void* workspace, const Device& device);  // fp16
void attn_bwd_sm80(const AttnBwdParams& b, void* workspace, const Device& device);  // fp16, bf16

// fp16, bf16; sm_90 alone. What it doesn't take goes to the kernels of sm_80.
void attn_bwd_sm90(const AttnBwdParams& b, void* workspace, const Device& device);
bool attn_bwd_sm90_takes(const AttnBwdParams& b);
int64_t attn_bwd_sm90_workspace(const AttnBwdParams& b);

}  // namespace fastattn::cuda
