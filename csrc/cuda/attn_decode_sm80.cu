#include "attn_decode_mma.cuh"

namespace fastattn::cuda::decode {

void launch_sm80(const KernelParams& p, const Device& device, const std::string& what) {
  if (p.dtype == DType::kBF16) return launch_mma<Sm80, bf16>(p, device, what);
  launch_mma<Sm80, fp16>(p, device, what);
}

}  // namespace fastattn::cuda::decode
