#include "attn_bwd.cuh"
#include "attn_bwd.h"

namespace fastattn::cuda {

void attn_bwd_fp32(const AttnBwdParams& b, void* workspace, const Device& device) {
  launch_attn_bwd<MultiplyAdd>(b, workspace, device);
}

}  // namespace fastattn::cuda
