// Small kernels, one for each thing the emulator does or finds. tests/test_emulator.py calls them.
#include <cstdio>
#include "launch.cuh"
#include "ptx.cuh"

namespace fastattn::cuda {
namespace {

struct MmaParams {
  const uint16_t *a, *b;  // (16, 16), (8, 16): b is transposed
  float* d;               // (16, 8)
};

template <class Element>
__global__ void __launch_bounds__(32) mma_k16(const __grid_constant__ MmaParams p) {
  FASTATTN_SHARED(shared);
  auto* sA = reinterpret_cast<uint16_t*>(shared);
  auto* sB = sA + 256;
  const int lane = threadIdx.x;
  ptx::cp_async_16(sA + 8 * lane, p.a + 8 * lane, 16);
  if (lane < 16) ptx::cp_async_16(sB + 8 * lane, p.b + 8 * lane, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t a[4], b[4];
  float d[4] = {};
  ptx::ldmatrix_x4(a, sA + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix_x4(b, sB + lane % 8 * 16 + lane / 8 % 2 * 8);
  ptx::mma_m16n8k16(d, a, b[0], b[1], Element{});
  for (int i = 0; i < 4; ++i) p.d[(lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = d[i];
}

}  // namespace

extern "C" const char* test_mma_k16(const uint16_t* a, const uint16_t* b, float* d, int bf) {
  const MmaParams p{a, b, d};
  return emulator::guarded([&] {
    launch(bf ? mma_k16<bf16> : mma_k16<fp16>, Grid{1, 1, 1, 32, 768}, p, Device{}, "mma_k16");
  });
}

}  // namespace fastattn::cuda
