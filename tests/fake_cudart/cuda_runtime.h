// As much of CUDA's runtime as launching takes, without a GPU: it notes what was asked of it, and
// fails when told to.
#pragma once

#include <cstddef>
#include <string>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline

enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
using cudaStream_t = void*;
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline std::string asked, failing;  // calls so far; the one that fails

inline cudaError_t ask(const std::string& call) {
  asked += call + "\n";
  return static_cast<cudaError_t>(!failing.empty() && call.rfind(failing, 0) == 0);
}

inline const char* cudaGetErrorString(cudaError_t) { return "the fake has failed"; }
inline cudaError_t cudaSetDevice(int index) { return ask("set device " + std::to_string(index)); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  constexpr int kH100[] = {9, 0, 132, 232448};
  *value = kH100[which];
  return ask("attribute " + std::to_string(which));
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return ask("allow " + std::to_string(bytes));
}
inline cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void** arguments,
                                    std::size_t shared_bytes, cudaStream_t stream) {
  return ask("launch " + std::to_string(grid.x) + " " + std::to_string(grid.y) + " " +
             std::to_string(grid.z) + " of " + std::to_string(block.x) + ", " +
             std::to_string(shared_bytes) + " bytes, argument " +
             std::to_string(*static_cast<int*>(arguments[0])) + ", stream " +
             std::to_string(reinterpret_cast<std::size_t>(stream)));
}
