// Attention's backward by architecture: what attn_bwd.cu chooses from.
#pragma once

#include "kernels.h"

namespace fastattn::cuda {

void attn_bwd_fp32(const AttnBwdParams& b, void* workspace, const Device& device);
void attn_bwd_sm75(const AttnBwdParams& b, void* workspace, const Device& device);  // fp16
void attn_bwd_sm80(const AttnBwdParams& b, void* workspace, const Device& device);  // fp16, bf16

}  // namespace fastattn::cuda
