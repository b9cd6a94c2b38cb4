// Kernels with a fault, or without it when they are told: one for each thing the emulator finds.
#include "test_kernels.h"

namespace fastattn::cuda {
namespace {

// --- order within a block ------------------------------------------------------------------------

// number[0]: 0 as it should be; what is left out otherwise
enum Missing { kNothing, kBarrierAfterWrite, kBarrierBeforeRewrite };

// out[i] = i + 1, then again i + 2, each written to shared memory by the thread's neighbour
__global__ void neighbours(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* s = reinterpret_cast<int*>(shared);
  const int i = threadIdx.x, n = blockDim.x;
  for (int round = 1; round < 3; ++round) {
    s[(i + 1) % n] = (i + 1) % n + round;
    if (a.number[0] != kBarrierAfterWrite) __syncthreads();
    pointer<int>(a, 0)[i] = s[i];
    if (a.number[0] != kBarrierBeforeRewrite) __syncthreads();
  }
}

// The same within warps, ordered by __syncwarp.
__global__ void lanes(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* s = reinterpret_cast<int*>(shared);
  const int i = threadIdx.x;
  for (int round = 1; round < 3; ++round) {
    s[i ^ 1] = (i ^ 1) + round;
    if (a.number[0] != kBarrierAfterWrite) __syncwarp();
    pointer<int>(a, 0)[i] = s[i];
    if (a.number[0] != kBarrierBeforeRewrite) __syncwarp();
  }
}

// Warp 0 hands (3, 32) numbers to warp 1 through one buffer: barrier 1 says it is full, 2 empty.
__global__ void producer_consumer(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* s = reinterpret_cast<int*>(shared);
  const int lane = threadIdx.x % 32;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0 && a.number[0] != kBarrierBeforeRewrite) ptx::bar_sync<2>(64);
      s[lane] = 32 * round + lane;
      ptx::bar_arrive<1>(64);
    } else {
      ptx::bar_sync<1>(64);
      if (a.number[0] == kBarrierAfterWrite) s[lane ^ 1] = s[lane];
      pointer<int>(a, 0)[32 * round + lane] = s[lane];
      if (round < 2 && a.number[0] != kBarrierBeforeRewrite) ptx::bar_arrive<2>(64);
    }
  }
}
// Barriers of different sizes; of more warps than come.
__global__ void wrong_named_barriers(const __grid_constant__ Arguments a) {
  if (a.number[0] == 0) {
    ptx::bar_sync<3>(threadIdx.x < 32 ? 64 : 96);
  } else if (threadIdx.x < 32) {
    ptx::bar_sync<3>(64);
  }
}

// Threads write single 16-bit elements of words that they share; then each reads four.
__global__ void halves(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* s = reinterpret_cast<uint16_t*>(shared);
  const int i = threadIdx.x;
  s[i] = static_cast<uint16_t>(i);
  if (a.number[0] != kBarrierAfterWrite) __syncthreads();
  if (i < 8) pointer<uint2>(a, 0)[i] = reinterpret_cast<uint2*>(s)[i];
}

// Two threads write the same word.
__global__ void both_write(const __grid_constant__ Arguments) {
  FASTATTN_SHARED(shared);
  if (threadIdx.x % 32 == 0) reinterpret_cast<int*>(shared)[0] = 1;
}

__global__ void atomics_on_shared(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* s = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 0) *s = 0;
  __syncthreads();
  atomicAdd(s, 1);
  if (a.number[0] != kBarrierAfterWrite) __syncthreads();
  if (threadIdx.x == 0) pointer<int>(a, 0)[0] = *s;
}

// What is left out, bit by bit: the wait, the barrier behind it.
__global__ void copy_and_read(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  const int i = threadIdx.x;
  ptx::cp_async_16(shared + 16 * i, pointer<uint4>(a, 0) + i, 16);
  ptx::cp_async_commit();
  if ((a.number[0] & 1) == 0) ptx::cp_async_wait<0>();
  if ((a.number[0] & 2) == 0) __syncthreads();
  const int other = a.number[1] ? i ^ 32 : i;
  pointer<uint4>(a, 1)[other] = reinterpret_cast<uint4*>(shared)[other];
  ptx::cp_async_wait<0>();
}

__global__ void read_unwritten(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  pointer<float>(a, 0)[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x];
}

// --- bounds --------------------------------------------------------------------------------------

// Thread 5 reads in[number[0]] and writes out[number[1]].
__global__ void read_and_write(const __grid_constant__ Arguments a) {
  if (threadIdx.x == 5) pointer<float>(a, 1)[a.number[1]] = pointer<float>(a, 0)[a.number[0]];
}
__global__ void copy_from(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  if (threadIdx.x == 5) {
    ptx::cp_async_16(shared + a.number[1], pointer<unsigned char>(a, 0) + a.number[0], a.number[2]);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
}
__global__ void write_shared(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  reinterpret_cast<float*>(shared)[a.number[0]] = 1;
}
__global__ void misaligned(const __grid_constant__ Arguments a) {
  if (threadIdx.x != 0) return;
  pointer<uint4>(a, 1)[0] =
      *reinterpret_cast<const uint4*>(pointer<unsigned char>(a, 0) + a.number[0]);
}
__global__ void misaligned_row(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared + a.number[0]);
}

// --- lanes and warps that don't meet -------------------------------------------------------------

__global__ void barrier_in_a_branch(const __grid_constant__ Arguments) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void different_shuffles(const __grid_constant__ Arguments a) {
  int x = threadIdx.x;
  if (x < 16) {
    x = __shfl_xor_sync(kAll, x, 1);
  } else {
    x = __shfl_xor_sync(kAll, x, 2);
  }
  pointer<int>(a, 0)[threadIdx.x] = x;
}
__global__ void shuffle_of_the_living(const __grid_constant__ Arguments a) {
  if (threadIdx.x >= 16) return;
  pointer<int>(a, 0)[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}
__global__ void part_of_a_mask(const __grid_constant__ Arguments a) {
  pointer<int>(a, 0)[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1);
}
// Warp 1 leaves; the barrier waits for the others only, as on a GPU.
__global__ void barrier_of_the_living(const __grid_constant__ Arguments a) {
  if (threadIdx.x / 32 == 1) return;
  __syncthreads();
  pointer<int>(a, 0)[threadIdx.x] = 1;
}

// --- order between blocks ------------------------------------------------------------------------

// Every block writes out[blockIdx.x / number[0]].
__global__ void blocks_write(const __grid_constant__ Arguments a) {
  if (threadIdx.x == 0) pointer<int>(a, 0)[blockIdx.x / a.number[0]] = 1;
}
// Block 0 writes what block 1 reads.
__global__ void blocks_read(const __grid_constant__ Arguments a) {
  if (threadIdx.x != 0) return;
  int* p = pointer<int>(a, 0);
  if (blockIdx.x == 0) {
    p[0] = 1;
  } else {
    p[1] = p[0];
  }
}

// Each block writes its part (blocks, threads), the last one to count itself sums them up: out (1).
// number[0]: 1 without the first fence, 2 without the second.
__global__ void last_block_sums(const __grid_constant__ Arguments a) {
  FASTATTN_SHARED(shared);
  auto* last = reinterpret_cast<int*>(shared);
  int* parts = pointer<int>(a, 0);
  const int i = threadIdx.x;
  parts[blockIdx.x * blockDim.x + i] = i;
  if (a.number[0] != 1) __threadfence();
  __syncthreads();
  if (i == 0) *last = atomicAdd(pointer<unsigned>(a, 1), 1u) == gridDim.x - 1;
  __syncthreads();
  if (!*last) return;
  if (a.number[0] != 2) __threadfence();
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += parts[b * blockDim.x + i];
  atomicAdd(pointer<int>(a, 2), sum);
}

// Block b waits for block b + 1 to have raised its flag: by atomics, or number[0]: volatile
// accesses.
__global__ void wait_for_the_next(const __grid_constant__ Arguments a) {
  auto* flags = pointer<unsigned>(a, 0);
  int* values = pointer<int>(a, 1);
  if (threadIdx.x != 0) return;
  if (blockIdx.x + 1 < gridDim.x) {
    volatile unsigned* next = flags + blockIdx.x + 1;
    while ((a.number[0] ? *next : atomicAdd(flags + blockIdx.x + 1, 0u)) == 0) __nanosleep(20);
    __threadfence();
    values[blockIdx.x] = values[blockIdx.x + 1] + 1;
  } else {
    values[blockIdx.x] = 1;
  }
  __threadfence();
  if (a.number[0]) {
    *static_cast<volatile unsigned*>(flags + blockIdx.x) = 1;
  } else {
    atomicExch(flags + blockIdx.x, 1u);
  }
}

TEST_KERNEL(neighbours);
TEST_KERNEL(lanes);
TEST_KERNEL(producer_consumer);
TEST_KERNEL(wrong_named_barriers);
TEST_KERNEL(halves);
TEST_KERNEL(both_write);
TEST_KERNEL(atomics_on_shared);
TEST_KERNEL(copy_and_read);
TEST_KERNEL(read_unwritten);
TEST_KERNEL(read_and_write);
TEST_KERNEL(copy_from);
TEST_KERNEL(write_shared);
TEST_KERNEL(misaligned);
TEST_KERNEL(misaligned_row);
TEST_KERNEL(barrier_in_a_branch);
TEST_KERNEL(different_shuffles);
TEST_KERNEL(shuffle_of_the_living);
TEST_KERNEL(part_of_a_mask);
TEST_KERNEL(barrier_of_the_living);
TEST_KERNEL(blocks_write);
TEST_KERNEL(blocks_read);
TEST_KERNEL(last_block_sums);
TEST_KERNEL(wait_for_the_next);

}  // namespace
}  // namespace fastattn::cuda
