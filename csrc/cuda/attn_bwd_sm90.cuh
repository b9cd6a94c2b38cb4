// Gradients of softmax(scale·QKᵀ …)V with wgmma and TMA, for sm_90a (Shah et al.,
// "FlashAttention-3", 2024): S and P are computed once, five products in all.
//
// A block of threads keeps block_k keys of one KV head, and its producer warpgroup brings the
// queries that see them, of all query heads of the group, in blocks of block_q. Two consumer
// warpgroups own 64 keys each; beyond head dim 128 they share 64 (bwd_wide_sm90.cuh). Keys are the
// rows of their fragments, so that
//
//   Sᵀ = K·Qᵀ    dPᵀ = V·dOᵀ    Pᵀ and dSᵀ in registers    dV += Pᵀ·dO    dK += dSᵀ·Q
//
// take Pᵀ and dSᵀ from where they are. Only dQ = dS·K needs the keys of all: dSᵀ passes through
// shared memory, each consumer makes 64 × 64 of dQ at a time, and TMA adds that to sums in fp32 in
// global memory, which a kernel at the end scales and rounds.
//
// Those sums come in no fixed order, unless the blocks of keys take turns at a block of queries
// (`turns`): the last keys first, which under a causal mask is the order they come to it in, and is
// how the grid then starts them. Otherwise it starts with the first keys, which most queries see.
#pragma once

#include "attn_bwd.cuh"
#include "bwd_keys_sm90.cuh"
#include "bwd_steps_sm90.cuh"
#include "bwd_wide_sm90.cuh"
#include "products_sm90.cuh"

namespace fastattn::cuda {

template <class T, int kHeadDim, Scores kScores>
FASTATTN_DEVICE void consume_queries(const AttnBwdSm90Launch& launch, const KeyTile<kHeadDim>& tile,
                                     BwdSharedSm90<kHeadDim> shared) {
  constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);
  constexpr int kBlockQ = kTile.block_q, kN = kBlockQ / 8, kD = kHeadDim / 8;
  const AttnBwdParams& b = launch.bwd.params;
  const AttnFwdParams& p = b.fwd;
  const Sequence& s = tile.sequence;
  const int seqlen_q = static_cast<int>(s.seqlen_q), seqlen_k = static_cast<int>(s.seqlen_k);
  const int consumer = threadIdx.x / kWarpgroupThreads, consumer_row = kWarpgroupRows * consumer;
  const int warp_row = threadIdx.x / 32 * 16, first_key = tile.first + consumer_row;
  const KernelWindow seen_by = KernelWindow(tile.window).transposed(seqlen_q);
  static_assert(kTile.dq_parts() == 2);
  const DQPart part = dq_part(kBlockQ, consumer);
  const int group_size = launch.bwd.order.group_size;

  float dk[1][kD][4], dv[1][kD][4];
  clear(dk);
  clear(dv);
  shared.k_ring.wait();
  clear_other_keys(launch, tile, shared);
  int buffer = 0;
#pragma unroll 1
  for (int head = tile.head * group_size; head < (tile.head + 1) * group_size; head++) {
    const Gradients<T, Rows::kKeys, true> gradients(b, s, tile.window, head);
#pragma unroll 1
    for (int m_block = tile.m_block_min; m_block < tile.m_block_end; m_block++) {
      const int query = m_block * kBlockQ;
      const Position at = thread_position(tile.first + warp_row, query);
      const float* lane_stats = shared.stats() + threadIdx.x % 4 * 2;
      const bool inside =
          first_key + kWarpgroupRows <= seqlen_k &&
          seen_by.shows({first_key, first_key + kWarpgroupRows}, {query, query + kBlockQ});
      float weights[1][kN][4], dweights[1][kN][4];
      shared.q_ring.wait();
      shared.dout_ring.wait();
      shared.stats_ring.wait();
      if (p.cu_seqlens_q && query + kBlockQ > seqlen_q) {
        clear_rows<BwdTileSm90::kConsumerThreads>(shared.q(), seqlen_q - query);
        clear_rows<BwdTileSm90::kConsumerThreads>(shared.dout(), seqlen_q - query);
        meet_consumers();
      }
      ptx::wgmma_fence();
      issue_rows<T>(weights, shared.k(), consumer_row, shared.q());
      issue_rows<T>(dweights, shared.v(), consumer_row, shared.dout());
      if constexpr (kScores == Scores::kPlain) {
        ptx::wgmma_wait<1>();
        ptx::settle(weights[0]);
        if (!inside) {
          hide_outside(weights, seen_by, at);
          fill_behind(weights, at.row, seqlen_k, -INFINITY);
        }
        plain_weights(weights, p.scale * kLog2E, lane_stats);
        ptx::wgmma_wait<0>();
        ptx::settle(dweights[0]);
        plain_gradients(weights, dweights, lane_stats + kBlockQ);
      } else {
        ptx::wgmma_wait<0>();
        ptx::settle(weights[0]);
        ptx::settle(dweights[0]);
        const auto stats = [&](int n, int, int e) {
          return make_float2(lane_stats[8 * n + e], lane_stats[kBlockQ + 8 * n + e]);
        };
        gradients.apply(weights, dweights, seen_by, inside, at, stats);
        if (!inside) {
          fill_behind(weights, at.row, seqlen_k, 0.0f);
          fill_behind(dweights, at.row, seqlen_k, 0.0f);
        }
      }
      __syncwarp();
      shared.stats_ring.release();
      uint32_t packed[kN / 2][4], dpacked[kN / 2][4];
      pack_weights<T>(packed, weights);
      pack_weights<T>(dpacked, dweights);

      const auto sDS = shared.ds(buffer);
      buffer ^= 1;
      store_ds(dpacked, sDS, warp_row);
      meet_consumers();  // dSᵀ is there, and nobody reads the other buffer any more
      float dq[1][8][4];
      ptx::wgmma_fence();
      issue_columns<T>(dq, sDS, part.rows, shared.k(), part.columns);
      issue_add<T>(dv, packed, shared.dout());
      issue_add<T>(dk, dpacked, shared.q());
      ptx::wgmma_wait<2>();
      ptx::settle(dq[0]);
      stage_dq(dq, shared.dq(consumer), consumer);
      if (threadIdx.x % kWarpgroupThreads == 0) {
        add_dq(launch, tile, head, m_block, consumer, shared.dq(consumer).bytes);
      }
      ptx::wgmma_wait<0>();
      ptx::settle(dk[0]);
      ptx::settle(dv[0]);
      shared.dout_ring.release();
      shared.q_ring.release();
    }
  }
  if (threadIdx.x % kWarpgroupThreads == 0) ptx::bulk_wait_read<0>();

  const uint32_t spoiled = spoiled_rows(p, dk) | spoiled_rows(p, dv);
  // Through V's rows, which this warp alone has multiplied by.
  const KeyBlock same = tile_again(launch, kTile.block_k);
  store_gradient(dk, shared.v(), warp_row,
                 head_at<T>(b.dk, b.dk_stride, same.sequence.batch, same.k_row, same.head),
                 b.dk_stride.seq, same.keys, p.head_dim, p.scale, launch.bwd.grads_aligned);
  __syncwarp();
  store_gradient(dv, shared.v(), warp_row,
                 head_at<T>(b.dv, b.dv_stride, same.sequence.batch, same.k_row, same.head),
                 b.dv_stride.seq, same.keys, p.head_dim_v, 1.0f, launch.bwd.grads_aligned);
  if (spoiled != 0) repair_dkv<T, kTile.block_k, true, true>(launch.bwd, warp_row, spoiled);
}

template <class T, int kHeadDim, Scores kScores>
static __global__ void __launch_bounds__(BwdTileSm90::kThreads, 1)
    attn_bwd_sm90_kernel(const __grid_constant__ AttnBwdSm90Launch launch) {
  const KeyTile<kHeadDim> tile(launch.bwd.params.fwd, launch.bwd.order);
  if (tile.keys <= 0) return;
  FASTATTN_SHARED(bytes);
  const BwdSharedSm90<kHeadDim> shared(bytes);
  if (threadIdx.x == 0) {
    constexpr int kWarps = BwdTileSm90::kConsumerThreads / 32;
    shared.k_ring.init(kWarps);
    shared.q_ring.init(kWarps);
    shared.dout_ring.init(kWarps);
    shared.stats_ring.init(kWarps);
    ptx::fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x < BwdTileSm90::kConsumerThreads) {
    ptx::set_max_registers_up<240>();
    if constexpr (bwd_tile_sm90(kHeadDim).shares_keys()) {
      consume_together<T, kHeadDim, kScores>(launch, tile, shared);
    } else {
      consume_queries<T, kHeadDim, kScores>(launch, tile, shared);
    }
  } else {
    ptx::set_max_registers_down<24>();
    constexpr int kFirst = BwdTileSm90::kConsumerThreads;
    if (threadIdx.x == kFirst) produce_queries(launch, tile, shared);
    if (threadIdx.x / 32 == kFirst / 32 + 1) produce_stats(launch, tile, shared);
  }
}

struct ClearLaunch {
  uint32_t* memory;
  int64_t words;
};

// Zeros, for sums and turns.
static __global__ void __launch_bounds__(256)
    attn_bwd_clear_kernel(const __grid_constant__ ClearLaunch launch) {
  for (int64_t i = int64_t{blockIdx.x} * 256 + threadIdx.x; i < launch.words;
       i += int64_t{gridDim.x} * 256) {
    launch.memory[i] = 0;
  }
}

struct DQStoreLaunch {
  AttnBwdLaunch bwd;
  const float* sums;
  int columns;
  uint32_t* spoiled;  // counts rows that are not finite; null where nothing is hidden
  int64_t blocks;     // WarpRow's

  FASTATTN_DEVICE const float* sums_of(const Sequence& s, const WarpRow& at) const {
    const AttnFwdParams& p = bwd.params.fwd;
    const int64_t batch = p.cu_seqlens_q ? 0 : at.batch;
    return sums + ((batch * p.heads_q + at.head) * p.tokens_q + s.q_row + at.query) * columns;
  }
};

// dQ of the sums, a warp to a row.
template <class T>
static __global__ void __launch_bounds__(128)
    attn_bwd_dq_store_kernel(const __grid_constant__ DQStoreLaunch launch) {
  const AttnBwdParams& b = launch.bwd.params;
  const AttnFwdParams& p = b.fwd;
  const WarpRow at(p);
  const Sequence s = sequence_at(p, at.batch);
  if (at.query >= s.seqlen_q) return;
  const float* sums = launch.sums_of(s, at);
  T* dq = head_at<T>(b.dq, b.dq_stride, s.batch, s.q_row + at.query, at.head);
  float zero = 0.0f;  // or NaN
  for (int d = threadIdx.x % 32; d < p.head_dim; d += 32) {
    store_element(dq + d, sums[d] * p.scale);
    zero += 0.0f * sums[d];
  }
  const bool finite = !__any_sync(0xffffffffu, zero != 0.0f);
  if (launch.spoiled && !finite && threadIdx.x % 32 == 0) atomicAdd(launch.spoiled, 1u);
}

// Rows that are not finite, once more: a kernel of its own, which takes three times the registers.
template <class T>
static __global__ void __launch_bounds__(128)
    attn_bwd_dq_repair_kernel(const __grid_constant__ DQStoreLaunch launch) {
  if (*launch.spoiled == 0) return;
  const AttnFwdParams& p = launch.bwd.params.fwd;
#pragma unroll 1
  for (int64_t block = blockIdx.x; block < launch.blocks; block += gridDim.x) {
    const WarpRow at(p, static_cast<unsigned>(block));
    const Sequence s = sequence_at(p, at.batch);
    if (at.query >= s.seqlen_q) continue;
    const float* sums = launch.sums_of(s, at);
    float zero = 0.0f;
    for (int d = threadIdx.x % 32; d < p.head_dim; d += 32) zero += 0.0f * sums[d];
    if (__any_sync(0xffffffffu, zero != 0.0f)) {
      repair_dq<T>(launch.bwd, at.batch, at.head, at.query);
    }
  }
}

// What of a problem's workspace is whose. lse and delta: (B, H_q, S_q); sums: (B, H_q, S_q,
// columns) or, packed, (H_q, T_q, columns); turns; and a count. The sums and lse and delta are
// fp32, the others uint32.
struct BwdWorkspaceSm90 {
  int64_t rows, sums, turns, spoiled;  // words
  int columns;

  explicit BwdWorkspaceSm90(const AttnBwdParams& b) {
    const AttnFwdParams& p = b.fwd;
    const BwdTileSm90 tile = bwd_tile_sm90(greater(p.head_dim, p.head_dim_v));
    columns = tile.head_dim;
    rows = round_up(p.batch * p.heads_q * p.seqlen_q, 32);  // 128 bytes, for TMA
    sums = (p.cu_seqlens_q ? 1 : p.batch) * p.heads_q * p.tokens_q * columns;
    const int64_t m_blocks = ceil_div(p.seqlen_q, tile.block_q);
    turns = b.deterministic ? p.batch * p.heads_q * m_blocks * tile.dq_parts() : 0;
    spoiled = hides_keys(p);
  }
  int64_t bytes() const { return 4 * (2 * rows + cleared()); }
  int64_t cleared() const { return sums + turns + spoiled; }
};

template <class T, int kHeadDim>
void launch_attn_bwd_sm90(const AttnBwdParams& b, void* workspace, const Device& device) {
  constexpr BwdTileSm90 kTile = bwd_tile_sm90(kHeadDim);
  static_assert(kTile.shared_bytes() <= kMostSharedSm90);
  const AttnFwdParams& p = b.fwd;
  const BwdWorkspaceSm90 space(b);
  auto* const lse = static_cast<float*>(workspace);
  float* const sums = lse + 2 * space.rows;
  auto* const turns = reinterpret_cast<uint32_t*>(sums + space.sums);
  AttnBwdSm90Launch params{};
  params.bwd.params = b;
  params.bwd.lse = lse;
  params.bwd.delta = lse + space.rows;
  params.bwd.order = make_key_order(p, kTile.block_k, sizeof(T));
  params.bwd.order.ascending = !b.deterministic;
  params.bwd.grads_aligned = rows_aligned<T>(b.dk, b.dk_stride, p.head_dim) &&
                             rows_aligned<T>(b.dv, b.dv_stride, p.head_dim_v);
  params.turns = b.deterministic ? turns : nullptr;
  const auto mapped_q = [&](const void* data, const Strides& stride, int64_t cols) {
    return tensor_map(mapped(p, data, stride, p.tokens_q, p.heads_q, cols, kTile.block_q));
  };
  const auto mapped_k = [&](const void* data, const Strides& stride, int64_t cols) {
    return tensor_map(mapped(p, data, stride, p.tokens_k, p.heads_k, cols, kTile.block_k));
  };
  params.q = mapped_q(p.q, p.q_stride, p.head_dim);
  params.dout = mapped_q(b.dout, b.dout_stride, p.head_dim_v);
  params.k = mapped_k(p.k, p.k_stride, p.head_dim);
  params.v = mapped_k(p.v, p.v_stride, p.head_dim_v);
  const Strides sums_stride{p.heads_q * p.tokens_q * kHeadDim, kHeadDim, p.tokens_q * kHeadDim};
  MappedTensor mapped_sums = mapped(p, sums, sums_stride, p.tokens_q, p.heads_q, kHeadDim, 64);
  mapped_sums.dtype = DType::kF32;
  params.dq = tensor_map(mapped_sums);

  const std::string shape = describe(p);
  const Grid rows = WarpRow::grid(p);
  launch(attn_bwd_prep_kernel<T>, rows, params.bwd, device, "attn_bwd_prep of " + shape);
  if (b.dsinks) {
    launch(attn_bwd_dsinks_kernel, {p.heads_q, 1, 1, 32}, params.bwd, device,
           "attn_bwd_dsinks of " + shape);
  }
  const ClearLaunch clear{reinterpret_cast<uint32_t*>(sums), space.cleared()};
  launch(attn_bwd_clear_kernel,
         {lesser(ceil_div(clear.words, 256), 8 * device.multiprocessors), 1, 1, 256}, clear, device,
         "attn_bwd_clear of " + shape);
  const Grid grid{params.bwd.order.items(), 1, 1, kTile.kThreads, kTile.shared_bytes()};
  if (is_rich(p)) {
    launch(attn_bwd_sm90_kernel<T, kHeadDim, Scores::kRich>, grid, params, device,
           "attn_bwd of " + shape);
  } else {
    launch(attn_bwd_sm90_kernel<T, kHeadDim, Scores::kPlain>, grid, params, device,
           "attn_bwd of " + shape);
  }
  const DQStoreLaunch store{params.bwd, sums, kHeadDim,
                            space.spoiled ? turns + space.turns : nullptr, rows.x};
  launch(attn_bwd_dq_store_kernel<T>, rows, store, device, "attn_bwd_dq_store of " + shape);
  if (store.spoiled) {
    const Grid few{lesser(rows.x, 2 * device.multiprocessors), 1, 1, 128};
    launch(attn_bwd_dq_repair_kernel<T>, few, store, device, "attn_bwd_dq_repair of " + shape);
  }
}

template <class T>
void launch_attn_bwd_sm90(const AttnBwdParams& b, void* workspace, const Device& device) {
  const int64_t head_dim = greater(b.fwd.head_dim, b.fwd.head_dim_v);
  if (head_dim <= 64) return launch_attn_bwd_sm90<T, 64>(b, workspace, device);
  if (head_dim <= 128) return launch_attn_bwd_sm90<T, 128>(b, workspace, device);
  if (head_dim <= 192) return launch_attn_bwd_sm90<T, 192>(b, workspace, device);
  launch_attn_bwd_sm90<T, 256>(b, workspace, device);
}

}  // namespace fastattn::cuda
