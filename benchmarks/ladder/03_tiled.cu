// Rung 3: tiles. Each load feeds many multiply-adds.
//
// Adds the two levels of reuse that every matrix product has. A block of 256 threads takes 64
// queries; 64 keys, then 64 values, come to shared memory once for all of them, and the online
// softmax goes forward by a tile instead of a key. A thread owns 4 × 4 scores and 4 × D/16 outputs
// in registers: eight 16-byte loads from shared memory feed 64 multiply-adds.
//
// The bound is the rate of instructions, which is that of multiply-adds in fp32, 128 a cycle in an
// SM: nine of ten in the inner loops are such. Rows in shared memory have 4 more floats than they
// need, so that 8 threads which read 16 bytes each of 8 rows find them in different banks.
#include "ladder.h"

namespace ladder {

constexpr int kThreads = 256, kTile = 64;  // queries, and keys at a time
constexpr int kPad = 4;

// Rows [first, first + 64) of a head to shared memory; zeros behind the last.
template <int kHeadDim>
FASTATTN_DEVICE void load_tile(float* tile, const float* rows, int first, int seqlen) {
  constexpr int kQuads = kHeadDim / 4;
  for (int i = threadIdx.x; i < kTile * kQuads; i += kThreads) {
    const int row = i / kQuads, quad = i % kQuads;
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (first + row < seqlen) {
      x = reinterpret_cast<const float4*>(rows + int64_t{first + row} * kHeadDim)[quad];
    }
    *reinterpret_cast<float4*>(tile + row * (kHeadDim + kPad) + 4 * quad) = x;
  }
}

FASTATTN_DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Over the 16 threads that share a row.
template <class Combine>
FASTATTN_DEVICE float over_row(float x, const Combine& combine) {
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) {
    x = combine(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  }
  return x;
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    tiled_kernel(const __grid_constant__ Attention<float> a) {
  constexpr int kStride = kHeadDim + kPad, kWeightStride = kTile + kPad;
  constexpr int kCols = kHeadDim / 64;  // groups of 4 columns of a thread's outputs
  FASTATTN_SHARED(shared);
  float* sQ = reinterpret_cast<float*>(shared);
  float* sKV = sQ + kTile * kStride;  // K, then V
  float* sP = sKV + kTile * kStride;

  // Rows 4·ty + i; keys tx + 16·j; columns 4·tx … of every 64.
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int first_query = blockIdx.x * kTile;
  const int64_t head = int64_t{blockIdx.y} * a.seqlen * kHeadDim;

  load_tile<kHeadDim>(sQ, a.q + head, first_query, a.seqlen);
  float out[4][kCols][4] = {}, row_max[4], row_sum[4];
  for (int i = 0; i < 4; i++) row_max[i] = -INFINITY, row_sum[i] = 0.0f;

  for (int first_key = 0; first_key < a.seqlen; first_key += kTile) {
    load_tile<kHeadDim>(sKV, a.k + head, first_key, a.seqlen);
    __syncthreads();  // K is there
    float scores[4][4] = {};
#pragma unroll 4
    for (int d = 0; d < kHeadDim; d += 4) {
      float4 q[4], k[4];
#pragma unroll
      for (int i = 0; i < 4; i++) q[i] = load4(sQ + (4 * ty + i) * kStride + d);
#pragma unroll
      for (int j = 0; j < 4; j++) k[j] = load4(sKV + (tx + 16 * j) * kStride + d);
#pragma unroll
      for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          scores[i][j] += q[i].x * k[j].x;
          scores[i][j] += q[i].y * k[j].y;
          scores[i][j] += q[i].z * k[j].z;
          scores[i][j] += q[i].w * k[j].w;
        }
      }
    }
    __syncthreads();  // nobody reads K any more

    load_tile<kHeadDim>(sKV, a.v + head, first_key, a.seqlen);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float new_max = row_max[i];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const bool there = first_key + tx + 16 * j < a.seqlen;
        scores[i][j] = there ? scores[i][j] * a.scale : -INFINITY;
        new_max = fmaxf(new_max, scores[i][j]);
      }
      new_max = over_row(new_max, [](float x, float y) { return fmaxf(x, y); });
      const float rescale = expf(row_max[i] - new_max);
      row_max[i] = new_max;
      row_sum[i] *= rescale;  // of this thread's keys, until the end
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float weight = expf(scores[i][j] - new_max);
        row_sum[i] += weight;
        sP[(4 * ty + i) * kWeightStride + tx + 16 * j] = weight;
      }
#pragma unroll
      for (int c = 0; c < kCols; c++) {
#pragma unroll
        for (int e = 0; e < 4; e++) out[i][c][e] *= rescale;
      }
    }
    __syncthreads();  // V and P are there
#pragma unroll 4
    for (int key = 0; key < kTile; key += 4) {
      float4 p[4];
#pragma unroll
      for (int i = 0; i < 4; i++) p[i] = load4(sP + (4 * ty + i) * kWeightStride + key);
#pragma unroll
      for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int c = 0; c < kCols; c++) {
          const float4 v = load4(sKV + (key + n) * kStride + 64 * c + 4 * tx);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float weight = n == 0 ? p[i].x : n == 1 ? p[i].y : n == 2 ? p[i].z : p[i].w;
            out[i][c][0] += weight * v.x;
            out[i][c][1] += weight * v.y;
            out[i][c][2] += weight * v.z;
            out[i][c][3] += weight * v.w;
          }
        }
      }
    }
    __syncthreads();  // nobody reads V any more
  }

#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int query = first_query + 4 * ty + i;
    const float over_sum = 1.0f / over_row(row_sum[i], [](float x, float y) { return x + y; });
    if (query >= a.seqlen) continue;
#pragma unroll
    for (int c = 0; c < kCols; c++) {
      const float* x = out[i][c];
      *reinterpret_cast<float4*>(a.out + head + int64_t{query} * kHeadDim + 64 * c + 4 * tx) =
          make_float4(x[0] * over_sum, x[1] * over_sum, x[2] * over_sum, x[3] * over_sum);
    }
  }
}

template <int kHeadDim>
constexpr int kSharedBytes = 4 * (2 * kTile * (kHeadDim + kPad) + kTile * (kTile + kPad));

template <int kHeadDim, class T>
void forward(const Attention<T>& a, const Device& device) {
  const Grid grid{ceil_div(a.seqlen, kTile), a.heads, 1, kThreads, kSharedBytes<kHeadDim>};
  launch(tiled_kernel<kHeadDim>, grid, a, device, "tiled");
}

LADDER_RUNG(float);

}  // namespace ladder
