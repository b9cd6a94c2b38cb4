// Probes of what ptx.cuh has from sm_80 on.
#include "calibration.cuh"

namespace fastattn::cuda {
namespace {

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

const bool registered = add({
    {"mma_m16n8k16_bf16", entry<MmaK16<bf16>>()},
    {"mma_m16n8k16_fp16", entry<MmaK16<fp16>>()},
    {"cp_async_16", entry<CpAsync>()},
    {"cp_async_groups", entry<CpAsyncGroups>()},
});

}  // namespace
}  // namespace fastattn::cuda
