// Starting a kernel, on a GPU or in the emulator. A kernel takes one struct:
//   template <…> __global__ void __launch_bounds__(kThreads) name(const __grid_constant__ Params p)
//
// In a header it is static: files are compiled for different architectures, and where two have the
// same instance, nvcc before 13 lets both start that of one of them.
#pragma once

#include <stdexcept>
#include <string>

#include "elements.cuh"
#include "kernels.h"

namespace fastattn::cuda {

struct Grid {
  int64_t x, y = 1, z = 1;  // blocks
  int threads;              // a block
  int shared_bytes = 0;     // dynamic shared memory a block
};

// `what` names kernel and shape in an error. A grid without blocks starts nothing.
//
// It only puts the kernel into the stream: nothing waits, so that CUDA graphs may capture it.
template <class Params>
void launch(void (*kernel)(Params), const Grid& grid, const Params& params, const Device& device,
            const std::string& what) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto fail = [&](const char* why) {
    throw std::runtime_error("fastattn: " + what + ": " + why);
  };
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    fail("more blocks than a grid takes");
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
#ifdef FASTATTN_EMULATE
  emulator::launch(blocks, dim3(grid.threads), grid.shared_bytes, what, [&] { kernel(params); });
#else
  const auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) fail(cudaGetErrorString(error));
  };
  if (grid.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes));
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(grid.threads),
                         arguments, grid.shared_bytes, static_cast<cudaStream_t>(device.stream)));
#endif
}

}  // namespace fastattn::cuda
