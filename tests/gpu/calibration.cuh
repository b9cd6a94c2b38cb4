// Each function of ptx.cuh and ptx_sm90.cuh on words that the host chooses, on a GPU and in the
// emulator: what calibration.py compares. Probes are in calibration.cu, calibration_sm80.cu and
// calibration_sm90.cu, by the first architecture that has the function.
//
// A probe runs one block of threads at a time. Every thread has kIn words, gives kOut, and shares
// kShared bytes with its block.
#pragma once

#include <map>
#include <string>

#include "launch.cuh"
#include "ptx.cuh"

namespace fastattn::cuda {

FASTATTN_DEVICE float as_float(uint32_t word) { return __uint_as_float(word); }

struct Words {
  const uint32_t* in;
  uint32_t* out;  // zeros before
};

template <class Probe>
__global__ void __launch_bounds__(Probe::kThreads, 1)
    probe_kernel(const __grid_constant__ Words words) {
  FASTATTN_SHARED(shared);
  const int64_t thread = int64_t(blockIdx.x) * Probe::kThreads + threadIdx.x;
  Probe::run(words.in + thread * Probe::kIn, words.out + thread * Probe::kOut, shared);
}

struct Entry {
  int threads, in, out, shared;
  void (*start)(const Entry&, const Words&, int blocks, const char* name);

  Grid grid(int blocks) const { return {blocks, 1, 1, threads, shared}; }
};
template <class Probe>
Entry entry() {
  return {Probe::kThreads, Probe::kIn, Probe::kOut, Probe::kShared,
          [](const Entry& e, const Words& words, int blocks, const char* name) {
            launch(probe_kernel<Probe>, e.grid(blocks), words, Device{}, name);
          }};
}

inline std::map<std::string, Entry>& probes() {
  static std::map<std::string, Entry> table;
  return table;
}
inline bool add(std::map<std::string, Entry> some) {
  probes().merge(some);
  return true;
}

}  // namespace fastattn::cuda
