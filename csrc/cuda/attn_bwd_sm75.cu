#include "attn_bwd.cuh"
#include "attn_bwd.h"

namespace fastattn::cuda {

void attn_bwd_sm75(const AttnBwdParams& b, void* workspace, const Device& device) {
  launch_attn_bwd<TensorCores<Sm75, fp16>>(b, workspace, device);
}

}  // namespace fastattn::cuda
