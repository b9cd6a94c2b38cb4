// A call of an operator whose kernels the emulator runs: they may touch the tensors that are its
// arguments and their scratch, and write only what the operator takes by value (see
// csrc/bindings.cpp).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "cuda/kernels.h"
#include "runtime.h"

#define FASTATTN_BUILT_FOR "emulated"

namespace fastattn {

class Call {
 public:
  template <class... Arguments>
  explicit Call(Arguments&&... arguments) {
    int number = 0;
    (add(arguments, !std::is_const_v<std::remove_reference_t<Arguments>>, number++), ...);
  }
  ~Call() { emulator_clear_buffers(); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const cuda::Device& device() const { return device_; }

  void* workspace(int64_t bytes) {
    workspace_ = torch::stable::empty({bytes + kAlignment}, torch::headeronly::ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(workspace_->data_ptr());
    void* aligned = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    emulator_add_buffer(aligned, bytes, "workspace", true);
    return aligned;
  }

 private:
  using Tensor = torch::stable::Tensor;
  static constexpr int64_t kAlignment = 256;

  static void add(const Tensor& t, bool writable, int number) {
    if (t.numel() == 0) return;
    int64_t last = 0;  // offset of the last element
    for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
    const std::string name = "tensor argument " + std::to_string(number);
    emulator_add_buffer(t.const_data_ptr(), (last + 1) * t.element_size(), name.c_str(), writable);
  }
  static void add(const std::optional<Tensor>& t, bool writable, int number) {
    if (t) add(*t, writable, number);
  }
  template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
  static void add(Number, bool, int) {}

  cuda::Device device_ = cuda::device(0, nullptr);
  std::optional<Tensor> workspace_;
};

}  // namespace fastattn
