// Which tensor core kernels this library has. They are written for sm_75, for sm_80 and all later
// architectures, and for sm_90 alone; csrc/cuda/nvcc.py leaves out what no architecture asked for
// takes, and names it here. What is left out must not be called: `if constexpr (has_kernels(90))`.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastattn::cuda {

constexpr bool has_kernels(int generation) {
#ifdef FASTATTN_WITHOUT_SM75
  if (generation == 75) return false;
#endif
#ifdef FASTATTN_WITHOUT_SM80
  if (generation == 80) return false;
#endif
#ifdef FASTATTN_WITHOUT_SM90
  if (generation == 90) return false;
#endif
  return true;
}

// fastattn/backend_cuda.py refuses such problems with more to say.
[[noreturn]] inline void throw_no_kernel(const char* op, DType dtype, const Device& device) {
  const char* name = dtype == DType::kBF16 ? "bfloat16" : "float16";
  throw std::runtime_error(std::string("fastattn: ") + op + ": this library has no kernel for " +
                           name + " on sm_" + std::to_string(device.arch));
}

}  // namespace fastattn::cuda
