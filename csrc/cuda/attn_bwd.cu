// Which kernels compute attention's backward on which architecture and dtype, and their workspace.
#include "attn_bwd.h"

#include "generations.h"

namespace fastattn::cuda {

namespace {

bool goes_to_sm90(const AttnBwdParams& b, const Device& device) {
  if constexpr (has_kernels(90)) {
    return device.arch == 90 && b.fwd.dtype != DType::kF32 && attn_bwd_sm90_takes(b);
  }
  return false;
}

}  // namespace

// lse and delta, each (B, H_q, S_q) in fp32; on sm_90 the sums of dQ too.
int64_t attn_bwd_workspace(const AttnBwdParams& b, const Device& device) {
  if constexpr (has_kernels(90)) {
    if (goes_to_sm90(b, device)) return attn_bwd_sm90_workspace(b);
  }
  return 2 * int64_t{sizeof(float)} * b.fwd.batch * b.fwd.heads_q * b.fwd.seqlen_q;
}

void attn_bwd(const AttnBwdParams& b, void* workspace, const Device& device) {
  if (b.fwd.dtype == DType::kF32) return attn_bwd_fp32(b, workspace, device);
  if constexpr (has_kernels(90)) {
    if (goes_to_sm90(b, device)) return attn_bwd_sm90(b, workspace, device);
  }
  if constexpr (has_kernels(80)) {
    if (device.arch >= 80) return attn_bwd_sm80(b, workspace, device);
  }
  if constexpr (has_kernels(75)) {
    if (device.arch < 80 && b.fwd.dtype == DType::kF16) return attn_bwd_sm75(b, workspace, device);
  }
  throw_no_kernel("attn_bwd", b.fwd.dtype, device);
}

}  // namespace fastattn::cuda
