#include "attn_bwd.cuh"
#include "attn_bwd.h"

namespace fastattn::cuda {

void attn_bwd_sm80(const AttnBwdParams& b, void* workspace, const Device& device) {
  if (b.fwd.dtype == DType::kBF16) {
    launch_attn_bwd<TensorCores<Sm80, bf16>>(b, workspace, device);
  } else {
    launch_attn_bwd<TensorCores<Sm80, fp16>>(b, workspace, device);
  }
}

}  // namespace fastattn::cuda
