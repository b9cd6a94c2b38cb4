// Times attention on Hopper for benchmarks/rank_sm90.py, which compiles it once a variant: the
// forward, or with BACKWARD=1 the backward.
//
//   rank_sm90 BATCH HEADS_Q HEADS_K SEQLEN CAUSAL REPEATS
//
// prints a checksum of out or dq, then the milliseconds of each repeat, the L2 cache flushed before
// it. Inputs are the same in every variant.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attn_bwd_sm90.cuh"
#include "attn_fwd_sm90.cuh"
#include "tensor_map.cu"

using namespace fastattn;
using namespace fastattn::cuda;

static void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "rank_sm90: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// (-1, 1) in bf16, by a hash of the index.
static __global__ void fill(uint16_t* x, int64_t count, uint32_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < count; i += gridDim.x * 256) {
    uint32_t h = (static_cast<uint32_t>(i) + seed) * 2654435761u;
    h = (h ^ h >> 15) * 2246822519u;
    x[i] = static_cast<uint16_t>(ptx::pack(static_cast<int>(h) * 0x1p-31f, 0.0f, bf16{}));
  }
}

template <class T>
static T* allocated(int64_t count) {
  T* memory;
  check(cudaMalloc(&memory, count * sizeof(T)));
  return memory;
}
static uint16_t* filled(int64_t count, uint32_t seed) {
  auto* const x = allocated<uint16_t>(count);
  fill<<<1024, 256>>>(x, count, seed);
  return x;
}

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  const auto number = [&](int i) { return static_cast<int64_t>(std::atoll(argv[i])); };
  AttnFwdParams p{};
  p.dtype = DType::kBF16;
  p.batch = number(1);
  p.heads_q = number(2);
  p.heads_k = number(3);
  p.seqlen_q = p.seqlen_k = p.tokens_q = p.tokens_k = number(4);
  p.head_dim = p.head_dim_v = HEAD_DIM;
  p.scale = 1.0f / sqrtf(HEAD_DIM);
  p.window_left = -1;
  p.window_right = number(5) ? 0 : -1;
  const auto strides = [&](int64_t heads) {
    return Strides{p.seqlen_q * heads * HEAD_DIM, heads * HEAD_DIM, HEAD_DIM};
  };
  p.q_stride = p.out_stride = strides(p.heads_q);
  p.k_stride = p.v_stride = strides(p.heads_k);
  const int64_t count_q = p.batch * p.q_stride.batch, count_k = p.batch * p.k_stride.batch;
  auto* const out = allocated<uint16_t>(count_q);
  p.q = filled(count_q, 1);
  p.k = filled(count_k, 2);
  p.v = filled(count_k, 3);
  p.out = out;
  p.lse = allocated<float>(p.batch * p.heads_q * p.seqlen_q);
  p.lse_stride_head = p.seqlen_q;
  p.lse_stride_batch = p.heads_q * p.seqlen_q;

  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0));
  const Device device{10 * properties.major + properties.minor, properties.multiProcessorCount,
                      static_cast<int>(properties.sharedMemPerBlockOptin), nullptr};
  launch_attn_fwd_sm90<bf16, HEAD_DIM, Scores::kPlain>(p, device);
#if BACKWARD
  AttnBwdParams b{};
  b.fwd = p;
  b.dout = filled(count_q, 4);
  auto* const checked = allocated<uint16_t>(count_q);
  b.dq = checked;
  b.dk = allocated<uint16_t>(count_k);
  b.dv = allocated<uint16_t>(count_k);
  b.dout_stride = b.dq_stride = p.q_stride;
  b.dk_stride = b.dv_stride = p.k_stride;
  void* const workspace = allocated<unsigned char>(BwdWorkspaceSm90(b).bytes());
  const auto run = [&] { launch_attn_bwd_sm90<bf16, HEAD_DIM>(b, workspace, device); };
#else
  uint16_t* const checked = out;
  const auto run = [&] { launch_attn_fwd_sm90<bf16, HEAD_DIM, Scores::kPlain>(p, device); };
#endif
  run();
  std::vector<uint16_t> result(count_q);
  check(cudaMemcpy(result.data(), checked, 2 * count_q, cudaMemcpyDeviceToHost));
  double sum = 0;
  for (const uint16_t bits : result) {
    const uint32_t word = uint32_t{bits} << 16;
    float x;
    static_assert(sizeof x == sizeof word);
    __builtin_memcpy(&x, &word, sizeof x);
    sum += x < 0 ? -x : x;
  }
  std::printf("%.6e\n", sum / static_cast<double>(count_q));

  constexpr size_t kFlush = 256 << 20;
  void* flush;
  check(cudaMalloc(&flush, kFlush));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int64_t i = 0; i < number(6); i++) {
    check(cudaMemsetAsync(flush, 0, kFlush));
    check(cudaEventRecord(begin));
    run();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    std::printf("%.5f\n", milliseconds);
  }
}
