// Rung 4: tensor cores. One instruction multiplies 16 × 16 by 16 × 8.
//
// Adds mma.sync in bf16 with fp32 sums. A warp owns 16 queries; their S, P and O stay in its
// registers, and P goes from accumulators to the operand of P·V as it lies, because both have the
// same layout: with lane = 4·group + t, a thread has columns 2t and 2t + 1 of rows group and group
// + 8. A row's maximum and sum need two shuffles, within a quad of lanes.
//
// The tensor cores are 16 times as fast as fp32, and now wait for shared memory. Rows of K lie 2·D
// bytes apart, a multiple of 128, so the 8 rows that a fragment takes 4 bytes of are all in the
// same banks: a load takes 8 turns instead of one. V's columns are collected from 2 bytes a row,
// with 4 turns. And while a tile is copied nobody multiplies.
#include "ladder.h"

namespace ladder {

constexpr int kWarps = 4, kQueries = 16 * kWarps, kKeys = 64, kThreads = 32 * kWarps;

// Rows [first, first + 64) of a head to shared memory, 16 bytes at a time; zeros behind the last.
template <int kHeadDim>
FASTATTN_DEVICE void load_tile(bf16* tile, const bf16* rows, int first, int seqlen) {
  constexpr int kChunks = kHeadDim / 8;
  for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (first + row < seqlen) {
      x = reinterpret_cast<const uint4*>(rows + int64_t{first + row} * kHeadDim)[chunk];
    }
    reinterpret_cast<uint4*>(tile)[i] = x;
  }
}

FASTATTN_DEVICE uint32_t load2(const bf16* p) { return *reinterpret_cast<const uint32_t*>(p); }

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    tensor_core_kernel(const __grid_constant__ Attention<bf16> a) {
  FASTATTN_SHARED(shared);
  bf16* sK = reinterpret_cast<bf16*>(shared);  // (64, D)
  bf16* sV = sK + kKeys * kHeadDim;
  const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t head = int64_t{blockIdx.y} * a.seqlen * kHeadDim;
  const int warp_row = blockIdx.x * kQueries + threadIdx.x / 32 * 16;
  const int rows[2] = {warp_row + group, warp_row + group + 8};

  // a[0], a[1]: columns 2t, 2t + 1 of both rows; a[2], a[3]: of the next 8 columns
  uint32_t q[kHeadDim / 16][4];
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bf16* row = a.q + head + int64_t{rows[i % 2]} * kHeadDim;
      q[k][i] = rows[i % 2] < a.seqlen ? load2(row + 16 * k + 8 * (i / 2) + 2 * t) : 0;
    }
  }
  float out[kHeadDim / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};

  for (int first_key = 0; first_key < a.seqlen; first_key += kKeys) {
    load_tile<kHeadDim>(sK, a.k + head, first_key, a.seqlen);
    load_tile<kHeadDim>(sV, a.v + head, first_key, a.seqlen);
    __syncthreads();  // K and V are there

    float scores[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; k++) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
        const bf16* b = sK + (8 * n + group) * kHeadDim + 16 * k + 2 * t;
        ptx::mma_m16n8k16(scores[n], q[k], load2(b), load2(b + 8), bf16{});
      }
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {  // rows group and group + 8
      float new_max = row_max[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          const bool there = first_key + 8 * n + 2 * t + e % 2 < a.seqlen;
          scores[n][e] = there ? scores[n][e] * a.scale : -INFINITY;
          new_max = fmaxf(new_max, scores[n][e]);
        }
      }
      new_max = quad_max(new_max);
      const float rescale = __expf(row_max[half] - new_max);
      row_max[half] = new_max;
      row_sum[half] *= rescale;  // of this thread's columns, until the end
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          scores[n][e] = __expf(scores[n][e] - new_max);
          row_sum[half] += scores[n][e];
        }
      }
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; d++) {
        out[d][2 * half] *= rescale;
        out[d][2 * half + 1] *= rescale;
      }
    }

#pragma unroll
    for (int k = 0; k < kKeys / 16; k++) {
      const float *low = scores[2 * k], *high = scores[2 * k + 1];
      const uint32_t p[4] = {ptx::pack(low[0], low[1], bf16{}), ptx::pack(low[2], low[3], bf16{}),
                             ptx::pack(high[0], high[1], bf16{}),
                             ptx::pack(high[2], high[3], bf16{})};
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; d++) {
        const bf16* b = sV + (16 * k + 2 * t) * kHeadDim + 8 * d + group;
        const auto two_rows = [](const bf16* x) {
          return uint32_t{x[0].bits} | uint32_t{x[kHeadDim].bits} << 16;
        };
        ptx::mma_m16n8k16(out[d], p, two_rows(b), two_rows(b + 8 * kHeadDim), bf16{});
      }
    }
    __syncthreads();  // nobody reads K and V any more
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float over_sum = 1.0f / quad_sum(row_sum[half]);
    if (rows[half] >= a.seqlen) continue;
    auto* row = reinterpret_cast<uint32_t*>(a.out + head + int64_t{rows[half]} * kHeadDim);
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; d++) {
      row[4 * d + t] =
          ptx::pack(out[d][2 * half] * over_sum, out[d][2 * half + 1] * over_sum, bf16{});
    }
  }
}

template <int kHeadDim>
constexpr int kSharedBytes = 2 * 2 * kKeys * kHeadDim;

template <int kHeadDim, class T>
void forward(const Attention<T>& a, const Device& device) {
  const Grid grid{ceil_div(a.seqlen, kQueries), a.heads, 1, kThreads, kSharedBytes<kHeadDim>};
  launch(tensor_core_kernel<kHeadDim>, grid, a, device, "tensor cores");
}

LADDER_RUNG(bf16);

}  // namespace ladder
