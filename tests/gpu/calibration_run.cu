// Runs probes for calibration.py.
#include <cstring>

#include "calibration.cuh"

namespace fastattn::cuda {
namespace {

void run(const Entry& e, const uint32_t* in, uint32_t* out, int blocks, const char* name) {
  const int64_t threads = int64_t{blocks} * e.threads;
  const int64_t in_bytes = threads * e.in * 4, out_bytes = threads * e.out * 4;
#ifdef FASTATTN_EMULATE
  emulator_add_buffer(in, in_bytes, "in", false);
  emulator_add_buffer(out, out_bytes, "out", true);
  std::memset(out, 0, out_bytes);
  const auto clear = [] { emulator_clear_buffers(); };
  try {
    e.start(e, {in, out}, blocks, name);
  } catch (...) {
    clear();
    throw;
  }
  clear();
#else
  const auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
    }
  };
  void* memory = nullptr;
  check(cudaMalloc(&memory, in_bytes + out_bytes));
  auto* device_in = static_cast<uint32_t*>(memory);
  uint32_t* device_out = device_in + in_bytes / 4;
  check(cudaMemcpy(device_in, in, in_bytes, cudaMemcpyHostToDevice));
  check(cudaMemset(device_out, 0, out_bytes));
  e.start(e, {device_in, device_out}, blocks, name);
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost));
  check(cudaFree(memory));
#endif
}

}  // namespace

extern "C" {

// Names of probes, one in a line.
const char* calibration_names() {
  static std::string names;
  names.clear();
  for (const auto& [name, entry] : probes()) names += name + "\n";
  return names.c_str();
}

// Threads of a block, words in and words out of a thread.
void calibration_shape(const char* name, int shape[3]) {
  const Entry& e = probes().at(name);
  shape[0] = e.threads;
  shape[1] = e.in;
  shape[2] = e.out;
}

// Null, or what went wrong.
const char* calibration_run(const char* name, const uint32_t* in, uint32_t* out, int blocks) {
  static std::string problem;
  try {
    run(probes().at(name), in, out, blocks, name);
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
  return nullptr;
}
}

}  // namespace fastattn::cuda
