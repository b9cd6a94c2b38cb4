// What of a GPU decides tiles and splits; asked of the driver once a GPU.
#include <array>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "elements.cuh"
#include "kernels.h"

namespace fastattn::cuda {

#ifdef FASTATTN_EMULATE

Device device(int, void*) {
  const char* named = std::getenv("FASTATTN_EMULATE_ARCH");
  const int arch = named ? std::atoi(named) : 80;
  const int multiprocessors =
      8;  // few, so that small problems are split as large ones are on a GPU
  switch (arch) {
    case 75:
      return {arch, multiprocessors, 64 << 10, nullptr};
    case 80:
      return {arch, multiprocessors, 163 << 10, nullptr};
    case 90:
      return {arch, multiprocessors, 227 << 10, nullptr};
    default:
      throw std::runtime_error(std::string("FASTATTN_EMULATE_ARCH=") + named +
                               " can't be emulated; 75, 80 and 90 can");
  }
}

#else

namespace {

constexpr int kMostDevices = 64;

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fastattn: no usable GPU: ") + cudaGetErrorString(error));
  }
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index));
  return value;
}

}  // namespace

Device device(int index, void* stream) {
  static std::array<Device, kMostDevices> known;
  static std::array<std::once_flag, kMostDevices> asked;
  if (index < 0 || index >= kMostDevices) {
    throw std::runtime_error("fastattn: there is no GPU number " + std::to_string(index));
  }
  check(cudaSetDevice(index));  // this library links a CUDA runtime of its own
  std::call_once(asked[index], [&] {
    known[index] = {10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                        attribute(cudaDevAttrComputeCapabilityMinor, index),
                    attribute(cudaDevAttrMultiProcessorCount, index),
                    attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index), nullptr};
  });
  Device device = known[index];
  device.stream = stream;
  return device;
}

#endif

}  // namespace fastattn::cuda
