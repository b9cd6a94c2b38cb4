#include "attn_fwd.cuh"

namespace fastattn::cuda {

void attn_fwd_sm75(const AttnFwdParams& p, const Device& device) {
  launch_attn_fwd<Sm75, fp16>(p, device);
}

}  // namespace fastattn::cuda
