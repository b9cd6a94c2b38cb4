// Rung 1: the formula, kernel by kernel.
//
//   S = scale · QKᵀ      one thread a score
//   P = softmax(S)       one thread a row, in place
//   O = P · V            one thread an output
//
// Everything between the kernels goes through memory: S is written, read three times, written again
// as P and read once more, 24 bytes a score, where 4·D FLOPs are computed. At S = 4096 one head's S
// is 64 MiB, more than the L2 cache of any GPU. Before memory is the bound, the loads are: each
// multiply-add has two of them, and neighbouring threads read K from neighbouring rows, 32 lines of
// the cache for one instruction of a warp.
#include "ladder.h"

namespace ladder {

constexpr int kThreads = 128;

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    scores_kernel(const __grid_constant__ Attention<float> a) {
  const int key = blockIdx.x * kThreads + threadIdx.x, query = blockIdx.y;
  if (key >= a.seqlen) return;
  const int64_t first_row = int64_t{blockIdx.z} * a.seqlen;  // of the head
  const float* q = a.q + (first_row + query) * kHeadDim;
  const float* k = a.k + (first_row + key) * kHeadDim;
  float sum = 0.0f;
  for (int d = 0; d < kHeadDim; d++) sum += q[d] * k[d];
  a.workspace[(first_row + query) * a.seqlen + key] = a.scale * sum;
}

__global__ void __launch_bounds__(kThreads)
    softmax_kernel(const __grid_constant__ Attention<float> a) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= int64_t{a.heads} * a.seqlen) return;
  float* scores = a.workspace + row * a.seqlen;
  float row_max = -INFINITY, row_sum = 0.0f;
  for (int j = 0; j < a.seqlen; j++) row_max = fmaxf(row_max, scores[j]);
  for (int j = 0; j < a.seqlen; j++) row_sum += expf(scores[j] - row_max);
  for (int j = 0; j < a.seqlen; j++) scores[j] = expf(scores[j] - row_max) / row_sum;
}

template <int kHeadDim>
__global__ void __launch_bounds__(kHeadDim)
    output_kernel(const __grid_constant__ Attention<float> a) {
  const int column = threadIdx.x, query = blockIdx.x;
  const int64_t first_row = int64_t{blockIdx.y} * a.seqlen;
  const float* weights = a.workspace + (first_row + query) * a.seqlen;
  const float* v = a.v + first_row * kHeadDim + column;
  float sum = 0.0f;
  for (int j = 0; j < a.seqlen; j++) sum += weights[j] * v[int64_t{j} * kHeadDim];
  a.out[(first_row + query) * kHeadDim + column] = sum;
}

template <int kHeadDim>
constexpr int kSharedBytes = 0;

template <int kHeadDim, class T>
void forward(const Attention<T>& a, const Device& device) {
  const int64_t rows = int64_t{a.heads} * a.seqlen;
  launch(scores_kernel<kHeadDim>, {ceil_div(a.seqlen, kThreads), a.seqlen, a.heads, kThreads}, a,
         device, "scores");
  launch(softmax_kernel, {ceil_div(rows, kThreads), 1, 1, kThreads}, a, device, "softmax");
  launch(output_kernel<kHeadDim>, {a.seqlen, a.heads, 1, kHeadDim}, a, device, "output");
}

LADDER_RUNG(float);

}  // namespace ladder
