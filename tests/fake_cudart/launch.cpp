// csrc/cuda/launch.cuh and device.cu over the fake runtime, for tests/test_cuda_launch.py.
#include "cuda_runtime.h"

#include "../../csrc/cuda/device.cu"
#include "../../csrc/cuda/launch.cuh"

namespace {

void kernel(int) {}

}  // namespace

// What went wrong, or null; `calls` becomes what the runtime was asked for.
extern "C" const char* launch_with_fake(int64_t x, int64_t y, int64_t z, int shared_bytes,
                                        int index, const char* fails, const char** calls) {
  using namespace fastattn::cuda;
  static std::string problem;
  asked.clear();
  failing = fails;
  problem.clear();
  try {
    const Grid grid{x, y, z, 64, shared_bytes};
    launch(kernel, grid, 7, device(index, reinterpret_cast<void*>(5)), "attn_fwd of (2, 3)");
  } catch (const std::exception& e) {
    problem = e.what();
  }
  *calls = asked.c_str();
  return problem.empty() ? nullptr : problem.c_str();
}
