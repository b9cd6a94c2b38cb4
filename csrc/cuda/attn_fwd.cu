// Which kernel computes attention's forward on which architecture and dtype.
#include <stdexcept>

#include "attn_fwd.h"

namespace fastattn::cuda {

void attn_fwd(const AttnFwdParams& p, const Device& device) {
  if (p.dtype == DType::kF32) return attn_fwd_fp32(p, device);
  if (device.arch == 90 && attn_fwd_sm90_takes(p)) return attn_fwd_sm90(p, device);
  if (device.arch >= 80) return attn_fwd_sm80(p, device);
  if (p.dtype != DType::kF16) {
    throw std::runtime_error("fastattn: attn_fwd: sm_75 has no bfloat16");
  }
  attn_fwd_sm75(p, device);
}

}  // namespace fastattn::cuda
