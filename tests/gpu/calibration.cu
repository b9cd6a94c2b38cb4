// Each function of ptx.cuh on words that the host chooses, on a GPU and in the emulator: what
// calibration.py compares.
//
// A probe runs one block of threads at a time. Every thread has kIn words, gives kOut, and shares
// kShared bytes with its block.
#include <map>
#include <string>

#include "launch.cuh"
#include "ptx.cuh"

namespace fastattn::cuda {
namespace {

FASTATTN_DEVICE float as_float(uint32_t word) { return __uint_as_float(word); }

// --- matrix fragments ----------------------------------------------------------------------------

// in: a lane's row of 16 bytes, stored at row 5·lane + 3 of 32; lanes bring rows in another order.
template <bool kTransposed>
struct Ldmatrix {
  static constexpr int kThreads = 32, kIn = 4, kOut = 4, kShared = 512;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    const int lane = threadIdx.x;
    auto* rows = reinterpret_cast<uint4*>(shared);
    rows[(5 * lane + 3) % 32] = make_uint4(in[0], in[1], in[2], in[3]);
    __syncwarp();
    uint32_t r[4];
    if constexpr (kTransposed) {
      ptx::ldmatrix_x4_trans(r, rows + (11 * lane + 7) % 32);
    } else {
      ptx::ldmatrix_x4(r, rows + (11 * lane + 7) % 32);
    }
    for (int i = 0; i < 4; i++) out[i] = r[i];
  }
};

// in: a (4 words), b (2), d (4 floats)
template <class T>
struct MmaK16 {
  static constexpr int kThreads = 32, kIn = 10, kOut = 4, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float d[4] = {as_float(in[6]), as_float(in[7]), as_float(in[8]), as_float(in[9])};
    ptx::mma_m16n8k16(d, a, in[4], in[5], T{});
    for (int i = 0; i < 4; i++) out[i] = __float_as_uint(d[i]);
  }
};

// in: a (2 words), b (1), d (4 floats)
struct MmaK8 {
  static constexpr int kThreads = 32, kIn = 7, kOut = 4, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    float d[4] = {as_float(in[3]), as_float(in[4]), as_float(in[5]), as_float(in[6])};
    ptx::mma_m16n8k8(d, in[0], in[1], in[2], fp16{});
    for (int i = 0; i < 4; i++) out[i] = __float_as_uint(d[i]);
  }
};

// --- copies and barriers -------------------------------------------------------------------------

// in: 16 bytes, how many of them (0 … 16) to copy; out: what then lies in shared memory
struct CpAsync {
  static constexpr int kThreads = 32, kIn = 8, kOut = 4, kShared = 512;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    auto* mine = reinterpret_cast<uint32_t*>(shared + 16 * threadIdx.x);
    for (int i = 0; i < 4; i++) mine[i] = 0x7fc01234;
    ptx::cp_async_16(mine, in, static_cast<int>(in[4] % 17));
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    for (int i = 0; i < 4; i++) out[i] = mine[i];
  }
};

// in: three groups of 16 bytes; out: the first two behind wait<1>, the third behind wait<0>
struct CpAsyncGroups {
  static constexpr int kThreads = 32, kIn = 12, kOut = 12, kShared = 3 * 512;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    const auto place = [&](int group) {
      return reinterpret_cast<uint32_t*>(shared + 512 * group + 16 * threadIdx.x);
    };
    for (int group = 0; group < 3; group++) {
      ptx::cp_async_16(place(group), in + 4 * group, 16);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<1>();
    for (int i = 0; i < 8; i++) out[i] = place(i / 4)[i % 4];
    ptx::cp_async_wait<0>();
    for (int i = 8; i < 12; i++) out[i] = place(2)[i % 4];
  }
};

// The second warp hands its words to the first by barrier 1, and gets the first's back by 2.
struct NamedBarriers {
  static constexpr int kThreads = 64, kIn = 1, kOut = 1, kShared = 256;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    auto* words = reinterpret_cast<uint32_t*>(shared);
    const int thread = threadIdx.x, other = thread ^ 63;
    words[thread] = in[0];
    if (thread >= 32) {
      ptx::bar_arrive<1>(64);
    } else {
      ptx::bar_sync<1>(64);
      out[0] = words[other];
    }
    ptx::bar_sync<2>(64);
    if (thread >= 32) out[0] = words[other];
  }
};

// --- arithmetic ----------------------------------------------------------------------------------

template <float (*kFunction)(float)>
struct Unary {
  static constexpr int kThreads = 128, kIn = 1, kOut = 1, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = __float_as_uint(kFunction(as_float(in[0])));
  }
};

template <class T>
struct Pack {
  static constexpr int kThreads = 128, kIn = 2, kOut = 1, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = ptx::pack(as_float(in[0]), as_float(in[1]), T{});
  }
};

struct ToFloat {
  static constexpr int kThreads = 128, kIn = 1, kOut = 1, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = __float_as_uint(ptx::to_float(fp16{static_cast<uint16_t>(in[0])}));
  }
};

struct Anew {
  static constexpr int kThreads = 128, kIn = 1, kOut = 1, kShared = 0;
  static FASTATTN_DEVICE void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = static_cast<uint32_t>(ptx::anew(static_cast<int>(in[0])));
  }
};

// --- running them --------------------------------------------------------------------------------

struct Words {
  const uint32_t* in;
  uint32_t* out;
};

template <class Probe>
__global__ void __launch_bounds__(Probe::kThreads)
    probe_kernel(const __grid_constant__ Words words) {
  FASTATTN_SHARED(shared);
  const int64_t thread = int64_t(blockIdx.x) * Probe::kThreads + threadIdx.x;
  Probe::run(words.in + thread * Probe::kIn, words.out + thread * Probe::kOut, shared);
}

struct Entry {
  void (*kernel)(Words);
  int threads, in, out, shared;
};
template <class Probe>
Entry entry() {
  return {probe_kernel<Probe>, Probe::kThreads, Probe::kIn, Probe::kOut, Probe::kShared};
}

const std::map<std::string, Entry>& probes() {
  static const std::map<std::string, Entry> table = {
      {"ldmatrix_x4", entry<Ldmatrix<false>>()},
      {"ldmatrix_x4_trans", entry<Ldmatrix<true>>()},
      {"mma_m16n8k16_bf16", entry<MmaK16<bf16>>()},
      {"mma_m16n8k16_fp16", entry<MmaK16<fp16>>()},
      {"mma_m16n8k8_fp16", entry<MmaK8>()},
      {"cp_async_16", entry<CpAsync>()},
      {"cp_async_groups", entry<CpAsyncGroups>()},
      {"named_barriers", entry<NamedBarriers>()},
      {"ex2", entry<Unary<ptx::ex2>>()},
      {"lg2", entry<Unary<ptx::lg2>>()},
      {"rcp", entry<Unary<ptx::rcp>>()},
      {"pack_bf16", entry<Pack<bf16>>()},
      {"pack_fp16", entry<Pack<fp16>>()},
      {"to_float_fp16", entry<ToFloat>()},
      {"anew", entry<Anew>()},
  };
  return table;
}

void run(const Entry& e, const uint32_t* in, uint32_t* out, int blocks, const char* name) {
  const int64_t threads = int64_t{blocks} * e.threads;
  const int64_t in_bytes = threads * e.in * 4, out_bytes = threads * e.out * 4;
  const Grid grid{blocks, 1, 1, e.threads, e.shared};
#ifdef FASTATTN_EMULATE
  emulator_add_buffer(in, in_bytes, "in", false);
  emulator_add_buffer(out, out_bytes, "out", true);
  const auto clear = [] { emulator_clear_buffers(); };
  try {
    launch(e.kernel, grid, Words{in, out}, Device{}, name);
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
  launch(e.kernel, grid, Words{device_in, device_out}, Device{}, name);
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
