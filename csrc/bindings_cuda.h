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
#include <stdexcept>
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

// Not all of them are written yet: what is missing is null in the library, and calling it throws.
namespace cuda {
[[gnu::weak]] void attn_fwd(const AttnFwdParams&, const Device&);
[[gnu::weak]] int64_t attn_bwd_workspace(const AttnBwdParams&, const Device&);
[[gnu::weak]] void attn_bwd(const AttnBwdParams&, void*, const Device&);
[[gnu::weak]] int64_t attn_decode_workspace(const AttnDecodeParams&, const Device&);
[[gnu::weak]] void attn_decode(const AttnDecodeParams&, void*, const Device&);
[[gnu::weak]] void cache_append(const CacheAppendParams&, const Device&);
[[gnu::weak]] void cross_entropy_fwd(const CrossEntropyParams&, const Device&);
[[gnu::weak]] void cross_entropy_bwd(const CrossEntropyParams&, const Device&);
}  // namespace cuda

// The kernels, for one call of an operator with these arguments.
class Kernels {
 public:
  template <class... Arguments>
  explicit Kernels(Arguments&&... arguments) : call_(std::forward<Arguments>(arguments)...) {}

  void attn_fwd(const AttnFwdParams& p) { start(cuda::attn_fwd, "attn_fwd", p); }
  void attn_bwd(const AttnBwdParams& p) {
    start(cuda::attn_bwd, "attn_bwd", p, cuda::attn_bwd_workspace);
  }
  void attn_decode(const AttnDecodeParams& p) {
    start(cuda::attn_decode, "attn_decode", p, cuda::attn_decode_workspace);
  }
  void cache_append(const CacheAppendParams& p) { start(cuda::cache_append, "cache_append", p); }
  void cross_entropy_fwd(const CrossEntropyParams& p) {
    start(cuda::cross_entropy_fwd, "cross_entropy_fwd", p);
  }
  void cross_entropy_bwd(const CrossEntropyParams& p) {
    start(cuda::cross_entropy_bwd, "cross_entropy_bwd", p);
  }

  // What the kernels are built for, as FASTATTN_CUDA_ARCHS has it; "emulated" in the emulator.
  static std::string target() { return FASTATTN_BUILT_FOR; }

 private:
  template <class Params>
  using Kernel = void (*)(const Params&, const cuda::Device&);
  template <class Params>
  using KernelWithWorkspace = void (*)(const Params&, void*, const cuda::Device&);
  template <class Params>
  using Workspace = int64_t (*)(const Params&, const cuda::Device&);

  template <class Params>
  void start(Kernel<Params> kernel, const char* name, const Params& p) {
    check_present(kernel != nullptr, name);
    kernel(p, call_.device());
  }
  template <class Params>
  void start(KernelWithWorkspace<Params> kernel, const char* name, const Params& p,
             Workspace<Params> workspace) {
    check_present(kernel != nullptr, name);
    kernel(p, call_.workspace(workspace(p, call_.device())), call_.device());
  }

  static void check_present(bool present, const char* name) {
    if (!present) throw std::runtime_error(std::string("there is no CUDA kernel yet for ") + name);
  }

  Call call_;
};

}  // namespace fastattn
