#include "attn_bwd_sm90.cuh"

#include "attn_bwd.h"

namespace fastattn::cuda {

bool attn_bwd_sm90_takes(const AttnBwdParams& b) {
  const AttnFwdParams& p = b.fwd;
  return can_map(mapped(p, p.q, p.q_stride, p.tokens_q, p.heads_q, p.head_dim, 1)) &&
         can_map(mapped(p, p.k, p.k_stride, p.tokens_k, p.heads_k, p.head_dim, 1)) &&
         can_map(mapped(p, p.v, p.v_stride, p.tokens_k, p.heads_k, p.head_dim_v, 1)) &&
         can_map(mapped(p, b.dout, b.dout_stride, p.tokens_q, p.heads_q, p.head_dim_v, 1));
}

int64_t attn_bwd_sm90_workspace(const AttnBwdParams& b) { return BwdWorkspaceSm90(b).bytes(); }

void attn_bwd_sm90(const AttnBwdParams& b, void* workspace, const Device& device) {
  if (b.fwd.dtype == DType::kBF16) {
    launch_attn_bwd_sm90<bf16>(b, workspace, device);
  } else {
    launch_attn_bwd_sm90<fp16>(b, workspace, device);
  }
}

}  // namespace fastattn::cuda
