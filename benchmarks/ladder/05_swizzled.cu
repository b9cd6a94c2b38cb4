// Rung 5: feed the tensor cores. FlashAttention-2's kernel (Dao, 2023) in its plainest form.
//
// Adds, all of it for what rung 4 waits for:
// - Swizzle: chunk c of row r, 16 bytes, lies at c ^ (r % 8), so that eight rows of one column of
//   chunks are in eight different groups of banks, without a byte of padding.
// - ldmatrix: one instruction brings fragments for two products, where rung 4 had four loads for K
//   and eight for V.
// - cp.async: the next tiles of K and V are copied to a second buffer during the products, without
//   registers in between, and with one barrier a tile.
// - ex2: softmax in powers of two. log2(e) · scale is one factor, so that a weight is a
//   multiply-add and an ex2.
//
// The bound is still how fast operands come: of a fragment of K or V, 512 bytes and 4 cycles of the
// whole SM's shared memory, only two products are made, because a warp has only 16 rows. On an A100
// that takes as long as the products do; on Hopper, whose tensor cores are twice as fast, longer.
// (csrc/cuda/attn_fwd.cuh gives a warp 32 rows where its registers allow.) Beyond, mma.sync itself
// is the bound on Hopper: operands that pass through registers reach about 60 % of what wgmma does.
#include "ladder.h"
#include "softmax.h"

namespace ladder {

constexpr int kWarps = 4, kQueries = 16 * kWarps, kKeys = 64, kThreads = 32 * kWarps;

// 64 rows of D elements.
template <int kHeadDim>
struct Tile {
  static constexpr int kChunks = kHeadDim / 8, kBytes = 64 * 2 * kHeadDim;
  unsigned char* bytes;

  FASTATTN_DEVICE unsigned char* chunk(int row, int c) const {
    return bytes + row * 2 * kHeadDim + ((c ^ row % 8) << 4);
  }
  // Sets going: rows [first, first + 64) of a head, zeros behind the last.
  FASTATTN_DEVICE void copy(const bf16* rows, int first, int seqlen) const {
#pragma unroll
    for (int i = 0; i < 64 * kChunks / kThreads; i++) {
      const int index = i * kThreads + threadIdx.x, row = index / kChunks, c = index % kChunks;
      const bool there = first + row < seqlen;
      const int64_t from = int64_t{there ? first + row : 0} * kHeadDim + 8 * c;
      ptx::cp_async_16(chunk(row, c), rows + from, there ? 16 : 0);
    }
  }
};

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    swizzled_kernel(const __grid_constant__ Attention<bf16> a) {
  using Tile = ladder::Tile<kHeadDim>;
  FASTATTN_SHARED(shared);
  const Tile sQ{shared};
  const auto sK = [&](int buffer) { return Tile{shared + (1 + 2 * buffer) * Tile::kBytes}; };
  const auto sV = [&](int buffer) { return Tile{shared + (2 + 2 * buffer) * Tile::kBytes}; };
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16,
            first_query = blockIdx.x * kQueries;
  const int64_t head = int64_t{blockIdx.y} * a.seqlen * kHeadDim;
  const int blocks = static_cast<int>(ceil_div(a.seqlen, kKeys));

  sQ.copy(a.q + head, first_query, a.seqlen);
  sK(0).copy(a.k + head, 0, a.seqlen);
  sV(0).copy(a.v + head, 0, a.seqlen);
  ptx::cp_async_commit();

  uint32_t q[kHeadDim / 16][4];
  float out[kHeadDim / 8][4] = {};
  Softmax softmax(a.scale);

  for (int block = 0; block < blocks; block++) {
    const int buffer = block % 2, first_key = block * kKeys;
    ptx::cp_async_wait<0>();
    __syncthreads();  // this block is there, and nobody reads the other buffer any more
    if (block == 0) {
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; k++) {
        ptx::ldmatrix_x4(q[k], sQ.chunk(warp_row + lane % 16, 2 * k + lane / 16));
      }
    }
    if (block + 1 < blocks) {
      sK(1 - buffer).copy(a.k + head, first_key + kKeys, a.seqlen);
      sV(1 - buffer).copy(a.v + head, first_key + kKeys, a.seqlen);
      ptx::cp_async_commit();
    }

    float scores[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; k++) {
#pragma unroll
      for (int n = 0; n < kKeys / 16; n++) {  // 16 keys: columns of two products
        uint32_t b[4];
        const int key = 16 * n + lane / 16 * 8 + lane % 8;
        ptx::ldmatrix_x4(b, sK(buffer).chunk(key, 2 * k + lane / 8 % 2));
        ptx::mma_m16n8k16(scores[2 * n], q[k], b[0], b[1], bf16{});
        ptx::mma_m16n8k16(scores[2 * n + 1], q[k], b[2], b[3], bf16{});
      }
    }

    if (first_key + kKeys > a.seqlen) softmax.hide(scores, a.seqlen - first_key);
    uint32_t weights[kKeys / 16][4];
    softmax.weigh(scores, weights, out);
#pragma unroll
    for (int k = 0; k < kKeys / 16; k++) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; d++) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, sV(buffer).chunk(16 * k + lane % 16, 2 * d + lane / 16));
        ptx::mma_m16n8k16(out[2 * d], weights[k], b[0], b[1], bf16{});
        ptx::mma_m16n8k16(out[2 * d + 1], weights[k], b[2], b[3], bf16{});
      }
    }
  }

  const int row = first_query + warp_row;
  softmax.store(out, a.out + head + int64_t{row} * kHeadDim, a.seqlen - row);
}

template <int kHeadDim>
constexpr int kSharedBytes = 5 * Tile<kHeadDim>::kBytes;  // Q, two of K, two of V

template <int kHeadDim, class T>
void forward(const Attention<T>& a, const Device& device) {
  const Grid grid{ceil_div(a.seqlen, kQueries), a.heads, 1, kThreads, kSharedBytes<kHeadDim>};
  launch(swizzled_kernel<kHeadDim>, grid, a, device, "swizzled");
}

LADDER_RUNG(bf16);

}  // namespace ladder
