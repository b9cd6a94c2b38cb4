// What csrc/bindings.cpp starts in the library of the CUDA kernels, fastattn_cuda: on a tensor's
// device, in torch's current stream, with scratch memory of torch's allocator.
//
// With FASTATTN_EMULATE, for tests, the library is fastattn_emulated: it takes CPU tensors, and
// tests/emulator has the Call.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "cuda/kernels.h"

#define FASTATTN_TARGET "architectures"  // the operator that tells Kernels::target()

#ifdef FASTATTN_EMULATE
#define FASTATTN_OPS fastattn_emulated
#define FASTATTN_KEY CPU
#include "emulated_call.h"
#else
#define FASTATTN_OPS fastattn_cuda
#define FASTATTN_KEY CUDA

namespace fastattn {

// One call of an operator: its tensors' device is current while it lasts.
class Call {
 public:
  template <class... Others>
  explicit Call(const torch::stable::Tensor& first, const Others&...)
      : first_(first), guard_(first.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));
    device_ = cuda::device(first.get_device_index(), stream);
  }

  const cuda::Device& device() const { return device_; }

  // Scratch for kernels of this call. Its memory may be reused behind them in the stream.
  void* workspace(int64_t bytes) {
    workspace_ = torch::stable::new_empty(first_, {bytes}, torch::headeronly::ScalarType::Byte);
    return workspace_->data_ptr();
  }

 private:
  torch::stable::Tensor first_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Device device_;
  std::optional<torch::stable::Tensor> workspace_;
};

}  // namespace fastattn

#endif

namespace fastattn {

// The kernels, for one call of an operator with these arguments.
class Kernels {
 public:
  template <class... Arguments>
  explicit Kernels(Arguments&&... arguments) : call_(std::forward<Arguments>(arguments)...) {}

  void attn_fwd(const AttnFwdParams& p) {
    void* workspace = scratch(cuda::attn_fwd_workspace(p, call_.device()));
    cuda::attn_fwd(p, workspace, call_.device());
  }
  void attn_entropy(const AttnEntropyParams& p) { cuda::attn_entropy(p, call_.device()); }
  void attn_bwd(const AttnBwdParams& p) {
    void* workspace = scratch(cuda::attn_bwd_workspace(p, call_.device()));
    cuda::attn_bwd(p, workspace, call_.device());
  }
  void attn_decode(const AttnDecodeParams& p) {
    void* workspace = scratch(cuda::attn_decode_workspace(p, call_.device()));
    cuda::attn_decode(p, workspace, call_.device());
  }
  void cache_append(const CacheAppendParams& p) { cuda::cache_append(p, call_.device()); }
  void cross_entropy_fwd(const CrossEntropyParams& p) {
    cuda::cross_entropy_fwd(p, call_.device());
  }
  void cross_entropy_bwd(const CrossEntropyParams& p) {
    cuda::cross_entropy_bwd(p, call_.device());
  }

  // What the kernels are built for, as FASTATTN_CUDA_ARCHS has it; "emulated" in the emulator.
  static std::string target() { return FASTATTN_BUILT_FOR; }

 private:
  void* scratch(int64_t bytes) { return bytes > 0 ? call_.workspace(bytes) : nullptr; }

  Call call_;
};

}  // namespace fastattn
