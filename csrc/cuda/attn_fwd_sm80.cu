#include "attn_fwd.cuh"

namespace fastattn::cuda {

void attn_fwd_sm80(const AttnFwdParams& p, const Device& device) {
  if (p.dtype == DType::kBF16) {
    launch_attn_fwd<Sm80, bf16>(p, device);
  } else {
    launch_attn_fwd<Sm80, fp16>(p, device);
  }
}

}  // namespace fastattn::cuda
