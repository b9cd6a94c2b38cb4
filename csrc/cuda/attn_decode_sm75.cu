#include "attn_decode_mma.cuh"

namespace fastattn::cuda::decode {

void launch_sm75(const KernelParams& p, const Device& device, const std::string& what) {
  launch_mma<Sm75, fp16>(p, device, what);
}

}  // namespace fastattn::cuda::decode
