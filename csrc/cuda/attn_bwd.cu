// Which kernels compute attention's backward on which architecture and dtype, and their workspace.
#include "attn_bwd.h"

#include <stdexcept>

namespace fastattn::cuda {

// lse and delta, each (B, H_q, S_q) in fp32.
int64_t attn_bwd_workspace(const AttnBwdParams& b, const Device&) {
  return 2 * int64_t{sizeof(float)} * b.fwd.batch * b.fwd.heads_q * b.fwd.seqlen_q;
}

void attn_bwd(const AttnBwdParams& b, void* workspace, const Device& device) {
  if (b.fwd.dtype == DType::kF32) return attn_bwd_fp32(b, workspace, device);
  if (device.arch >= 80) return attn_bwd_sm80(b, workspace, device);
  if (b.fwd.dtype != DType::kF16) {
    throw std::runtime_error("fastattn: attn_bwd: sm_75 has no bfloat16");
  }
  attn_bwd_sm75(b, workspace, device);
}

}  // namespace fastattn::cuda
