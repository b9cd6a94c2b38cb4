// Attention's forward by architecture: what attn_fwd.cu chooses from.
#pragma once

#include "kernels.h"

namespace fastattn::cuda {

void attn_fwd_sm75(const AttnFwdParams& p, const Device& device);  // fp16
void attn_fwd_fp32(const AttnFwdParams& p, const Device& device);
void attn_fwd_sm80(const AttnFwdParams& p, const Device& device);  // fp16, bf16
void attn_fwd_sm90(const AttnFwdParams& p, const Device& device);  // fp16, bf16; sm_90 alone
bool attn_fwd_sm90_takes(
    const AttnFwdParams& p);  // what TMA can't copy goes to the kernel of sm_80

}  // namespace fastattn::cuda
