// Kernels that do what they should: one for each thing the emulator does. tests/test_emulator.py
// starts them by name and says what must come out.
#include "test_kernels.h"

namespace fastattn::cuda {
namespace {

// out: (blocks · threads, 12)
__global__ void indices(const __grid_constant__ Arguments a) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int* out = pointer<int>(a, 0) + 12 * (block * blockDim.x + threadIdx.x);
  const dim3 all[4] = {threadIdx, blockIdx, blockDim, gridDim};
  for (int i = 0; i < 4; ++i) {
    out[3 * i] = static_cast<int>(all[i].x);
    out[3 * i + 1] = static_cast<int>(all[i].y);
    out[3 * i + 2] = static_cast<int>(all[i].z);
  }
}

// in: (32) lanes' operands; out: (4, 32) lanes read from by idx, up, down, xor of width number[0]
__global__ void shuffles(const __grid_constant__ Arguments a) {
  const int lane = threadIdx.x, operand = pointer<int>(a, 0)[lane], width = a.number[0];
  int* out = pointer<int>(a, 1) + lane;
  out[0] = __shfl_sync(kAll, lane, operand, width);
  out[32] = __shfl_up_sync(kAll, lane, operand, width);
  out[64] = __shfl_down_sync(kAll, lane, operand, width);
  out[96] = __shfl_xor_sync(kAll, lane, operand, width);
}

// in: (32) of 8 bytes; out: the same from the lane opposite
__global__ void shuffle_double(const __grid_constant__ Arguments a) {
  const int lane = threadIdx.x;
  pointer<double>(a, 1)[lane] = __shfl_xor_sync(kAll, pointer<double>(a, 0)[lane], 31);
}

// in: (32); out: (3, 32) ballot, any, all
__global__ void votes(const __grid_constant__ Arguments a) {
  const int lane = threadIdx.x, x = pointer<int>(a, 0)[lane];
  int* out = pointer<int>(a, 1) + lane;
  out[0] = static_cast<int>(__ballot_sync(kAll, x));
  out[32] = __any_sync(kAll, x);
  out[64] = __all_sync(kAll, x);
}

// in: (4, 8, 8) of 16 bits; out: (2, 4, 32) registers of ldmatrix_x4 and its transpose
__global__ void ldmatrix(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  const int lane = threadIdx.x;
  auto* row = reinterpret_cast<uint4*>(shared) + lane;
  *row = pointer<uint4>(a, 0)[lane];
  __syncwarp();
  uint32_t r[4];
  for (int transposed = 0; transposed < 2; ++transposed) {
    if (transposed) {
      ptx::ldmatrix_x4_trans(r, row);
    } else {
      ptx::ldmatrix_x4(r, row);
    }
    for (int i = 0; i < 4; ++i) pointer<uint32_t>(a, 1)[(transposed * 4 + i) * 32 + lane] = r[i];
  }
}

// a: (16, 16), b: (8, 16), b's transpose that is; d: (16, 8) fp32, added to
template <class Element>
__global__ void mma_k16(const __grid_constant__ Arguments p) {
  FASTATTN_SHARED(shared);
  auto* sA = reinterpret_cast<uint16_t*>(shared);
  auto* sB = sA + 256;
  const int lane = threadIdx.x;
  ptx::cp_async_16(sA + 8 * lane, pointer<uint16_t>(p, 0) + 8 * lane, 16);
  if (lane < 16) ptx::cp_async_16(sB + 8 * lane, pointer<uint16_t>(p, 1) + 8 * lane, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t a[4], b[4];
  float d[4];
  float* out[4];
  for (int i = 0; i < 4; ++i) {
    out[i] = pointer<float>(p, 2) + (lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2;
    d[i] = *out[i];
  }
  ptx::ldmatrix_x4(a, sA + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix_x4(b, sB + lane % 8 * 16 + lane / 8 % 2 * 8);
  ptx::mma_m16n8k16(d, a, b[0], b[1], Element{});
  for (int i = 0; i < 4; ++i) *out[i] = d[i];
}

// The same with a (16, 8) and b (8, 8), fragments from global memory.
__global__ void mma_k8(const __grid_constant__ Arguments p) {
  const int lane = threadIdx.x, group = lane / 4, t = lane % 4;
  const auto* a = pointer<uint32_t>(p, 0) + t;  // a row is 4 pairs
  float d[4];
  float* out[4];
  for (int i = 0; i < 4; ++i) {
    out[i] = pointer<float>(p, 2) + (group + i / 2 * 8) * 8 + 2 * t + i % 2;
    d[i] = *out[i];
  }
  ptx::mma_m16n8k8(d, a[4 * group], a[4 * (group + 8)], pointer<uint32_t>(p, 1)[4 * group + t],
                   fp16{});
  for (int i = 0; i < 4; ++i) *out[i] = d[i];
}

// in: fp32 (n); out: bf16 and fp16 (n) of them, two by two, and back to fp32
__global__ void conversions(const __grid_constant__ Arguments a) {
  const int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= a.number[0]) return;
  const float* x = pointer<float>(a, 0) + i;
  pointer<uint32_t>(a, 1)[i / 2] = ptx::pack(x[0], x[1], bf16{});
  const uint32_t halves = ptx::pack(x[0], x[1], fp16{});
  pointer<uint32_t>(a, 2)[i / 2] = halves;
  pointer<float>(a, 3)[i] = ptx::to_float(fp16{static_cast<uint16_t>(halves)});
  pointer<float>(a, 3)[i + 1] = ptx::to_float(fp16{static_cast<uint16_t>(halves >> 16)});
}

// in: fp32 (32); out: (3, 32) 2^x, log2 x, 1/x
__global__ void exponentials(const __grid_constant__ Arguments a) {
  const int lane = threadIdx.x;
  const float x = pointer<float>(a, 0)[lane];
  pointer<float>(a, 1)[lane] = ptx::ex2(x);
  pointer<float>(a, 1)[32 + lane] = ptx::lg2(x);
  pointer<float>(a, 1)[64 + lane] = ptx::rcp(x);
}

// in: bytes (17 · 16); out: the same through shared memory, the first n bytes of row n
__global__ void copy_bytes(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  const int row = threadIdx.x;
  if (row > 16) return;
  ptx::cp_async_16(shared + 16 * row, pointer<unsigned char>(a, 0) + 16 * row, row);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 16; ++i) {
    pointer<unsigned char>(a, 1)[16 * row + i] = shared[16 * row + i];
  }
}

// Groups complete in order: in (3, 32) floats through three groups, of which number[0] may be open.
__global__ void copy_groups(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* s = reinterpret_cast<float4*>(shared) + threadIdx.x;
  if (threadIdx.x < 8) {
    for (int i = 0; i < 3; ++i) {
      ptx::cp_async_16(s + 8 * i, pointer<float4>(a, 0) + 8 * i + threadIdx.x, 16);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<1>();
    for (int i = 0; i < 3 - a.number[0]; ++i) pointer<float4>(a, 1)[8 * i + threadIdx.x] = s[8 * i];
    ptx::cp_async_wait<0>();
  }
}

// Lane i reads the T at byte number[0] · i of shared memory, or brings it as a row of ldmatrix.
template <class T>
__global__ void strided(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  *pointer<T>(a, 0) = *reinterpret_cast<T*>(shared + a.number[0] * threadIdx.x);
}
__global__ void strided_ldmatrix(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared + a.number[0] * threadIdx.x);
}

// out: float, int, unsigned, unsigned long long sums, maximum, exchanged, compared
__global__ void atomics(const __grid_constant__ Arguments a) {
  auto* out = pointer<unsigned long long>(a, 0);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(reinterpret_cast<float*>(out), 0.5f);
  atomicAdd(reinterpret_cast<int*>(out + 1), -i);
  atomicAdd(reinterpret_cast<unsigned*>(out + 2), static_cast<unsigned>(i));
  atomicAdd(out + 3, 1ull << 33);
  atomicMax(reinterpret_cast<int*>(out + 4), i);
  if (i == 0) atomicExch(reinterpret_cast<unsigned*>(out + 5), 7u);
  atomicCAS(reinterpret_cast<unsigned*>(out + 6), 0u, static_cast<unsigned>(i + 1));
}

// Sums (blocks, threads) floats per block through shared memory: out (blocks).
__global__ void block_sums(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* s = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x;
  float sum = pointer<float>(a, 0)[blockIdx.x * blockDim.x + i];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
  if (i % 32 == 0) s[i / 32] = sum;
  __syncthreads();
  if (i == 0) {
    for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += s[w];
    pointer<float>(a, 1)[blockIdx.x] = sum;
  }
}

TEST_KERNEL(indices);
TEST_KERNEL(shuffles);
TEST_KERNEL(shuffle_double);
TEST_KERNEL(votes);
TEST_KERNEL(ldmatrix);
TEST_KERNEL(mma_k8);
TEST_KERNEL(conversions);
TEST_KERNEL(exponentials);
TEST_KERNEL(copy_bytes);
TEST_KERNEL(copy_groups);
TEST_KERNEL(atomics);
TEST_KERNEL(block_sums);
TEST_KERNEL(strided_ldmatrix);
const Registered strided_16("strided_16", strided<uint4>), strided_8("strided_8", strided<uint2>),
    strided_4("strided_4", strided<uint32_t>), strided_2("strided_2", strided<uint16_t>);
const Registered mma_k16_bf16("mma_k16_bf16", mma_k16<bf16>),
    mma_k16_fp16("mma_k16_fp16", mma_k16<fp16>);

}  // namespace

// grid: x, y, z. Null, or what went wrong.
extern "C" const char* run_kernel(const char* name, const int* grid, int threads, int shared_bytes,
                                  const Arguments* arguments) {
  return emulator::guarded([&] {
    launch(kernels().at(name), Grid{grid[0], grid[1], grid[2], threads, shared_bytes}, *arguments,
           Device{}, name);
  });
}

}  // namespace fastattn::cuda
