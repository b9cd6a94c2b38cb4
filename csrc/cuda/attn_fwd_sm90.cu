#include "attn_fwd_sm90.cuh"

#include "attn_fwd.h"

namespace fastattn::cuda {

bool attn_fwd_sm90_takes(const AttnFwdParams& p) {
  return can_map(mapped(p, p.q, p.q_stride, p.tokens_q, p.heads_q, p.head_dim, 1)) &&
         can_map(mapped(p, p.k, p.k_stride, p.tokens_k, p.heads_k, p.head_dim, 1)) &&
         can_map(mapped(p, p.v, p.v_stride, p.tokens_k, p.heads_k, p.head_dim_v, 1));
}

void attn_fwd_sm90(const AttnFwdParams& p, const Device& device) {
  if (p.dtype == DType::kBF16) {
    launch_attn_fwd_sm90<bf16>(p, device);
  } else {
    launch_attn_fwd_sm90<fp16>(p, device);
  }
}

}  // namespace fastattn::cuda
