// Rung 2: one kernel, one pass over the keys, and no S × S in memory.
//
// Adds the online softmax (Milakov and Gimelshein, 2018; Rabe and Staats, 2021): a maximum and a
// sum that are right for the keys seen so far. Where a new key raises the maximum, what was summed
// before is scaled down to it:
//
//   m' = max(m, s)   l' = l · e^(m − m') + e^(s − m')   o' = o · e^(m − m') + e^(s − m') · v
//
// A warp owns a query; lane i has columns i, i + 32, … of q and o, and keys are added up over the
// lanes. Memory is no bound any more: K and V are read from the caches. Instructions are: the sum
// over a warp takes ten for one score, the two exponentials are computed by all 32 lanes alike, and
// a multiply-add still has a load of its own. One key waits for the one before it.
#include "ladder.h"

namespace ladder {

constexpr int kWarps = 4;

FASTATTN_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

template <int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps)
    online_kernel(const __grid_constant__ Attention<float> a) {
  constexpr int kCols = kHeadDim / 32;
  const int lane = threadIdx.x % 32, query = blockIdx.x * kWarps + threadIdx.x / 32;
  if (query >= a.seqlen) return;
  const int64_t head = int64_t{blockIdx.y} * a.seqlen * kHeadDim;
  const int64_t mine = head + int64_t{query} * kHeadDim + lane;
  const float *k = a.k + head + lane, *v = a.v + head + lane;

  float q[kCols], out[kCols] = {}, row_max = -INFINITY, row_sum = 0.0f;
  for (int c = 0; c < kCols; c++) q[c] = a.q[mine + 32 * c] * a.scale;

  for (int key = 0; key < a.seqlen; key++, k += kHeadDim, v += kHeadDim) {
    float score = 0.0f;
    for (int c = 0; c < kCols; c++) score += q[c] * k[32 * c];
    score = warp_sum(score);

    const float new_max = fmaxf(row_max, score);
    const float rescale = expf(row_max - new_max), weight = expf(score - new_max);
    row_max = new_max;
    row_sum = row_sum * rescale + weight;
    for (int c = 0; c < kCols; c++) out[c] = out[c] * rescale + weight * v[32 * c];
  }
  const float over_sum = 1.0f / row_sum;
  for (int c = 0; c < kCols; c++) a.out[mine + 32 * c] = out[c] * over_sum;
}

template <int kHeadDim>
constexpr int kSharedBytes = 0;

template <int kHeadDim, class T>
void forward(const Attention<T>& a, const Device& device) {
  const Grid grid{ceil_div(a.seqlen, kWarps), a.heads, 1, 32 * kWarps};
  launch(online_kernel<kHeadDim>, grid, a, device, "online");
}

LADDER_RUNG(float);

}  // namespace ladder
