// A few queries against a long KV cache. What limits them is reading K and V, once:
//
//   Σ_b S_b · H_k · (D + D_v) elements; 2 · 8192 · 128 · 8 bf16 of a sequence are 34 MB, 7 µs at
//   4.8 TB/s.
//
// Neighbouring lanes, a team, hold 8 elements each of a row of K and of V, so that a team's load is
// one run of memory. A team goes through every kTeams-th key of its block's split with a softmax
// state of its own, q and out in registers: scores are summed over the team by shuffles, and nobody
// waits for anybody until the teams' results are merged through shared memory at the end. A second
// kernel merges the splits.
//
// A row and a key of 128 elements take 16 lanes some 28 instructions each, 450 in all for 512 bytes
// of K and V in bf16. An SM of sm_90 gets these bytes in 24 cycles, and issues 3072 meanwhile: four
// rows hide behind memory. More are attn_decode_mma.cuh's, or take several tiles, whose loads but
// the first come from L2.
#include <algorithm>

#include "attn_decode.cuh"
#include "generations.h"

namespace fastattn::cuda {
namespace decode {

// Keys a team loads at a time, and blocks that registers must leave room for on an SM, 96, 128 or
// 168 a thread: in 16 bits, 80 KiB of loads are then under way, or 36 where there are four rows; in
// fp32 more. Memory's latency takes some 30 to hide on sm_90.
template <class T, int kRows>
constexpr int kKeysAtATime = kRows == 1       ? 4
                             : sizeof(T) == 4 ? 2
                                              : 3;
template <class T, int kRows>
constexpr int kBlocksAtOnce = kRows > 1        ? 3
                              : sizeof(T) == 4 ? 4
                                               : 5;

// One tile of kRows rows, kLanes lanes a team: head dims up to kSlice · kLanes. kAligned: rows of
// q, K and V start at multiples of 16 bytes and are multiples of kSlice long.
template <class T, int kLanes, int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, kRows>)
    attn_decode_kernel(const __grid_constant__ KernelParams p) {
  constexpr int kTeams = kThreads / kLanes, kDims = kSlice * kLanes, kKeys = kKeysAtATime<T, kRows>;
  constexpr unsigned kAll = 0xffffffff;
  FASTATTN_SHARED(memory);
  float* sOut = reinterpret_cast<float*>(memory);  // see out_index
  RowState* sStates = reinterpret_cast<RowState*>(sOut + kThreads * kRows * kSlice);  // (…, kRows)

  const Tile t = Tile::of_block<kRows>(p);
  const Sequence sequence = sequence_at(p, t.batch);
  const int team = threadIdx.x / kLanes, dim = threadIdx.x % kLanes * kSlice;
  const int dims = int(p.head_dim) - dim, dims_v = int(p.head_dim_v) - dim;  // left from this one

  float q[kRows][kSlice], out[kRows][kSlice] = {};
  RowState states[kRows];
  int query[kRows];
  float slope[kRows];
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const Row row(t, r, p, sequence);
    query[r] = row.query;
    slope[r] = row.exists ? alibi_slope(p, t.batch, row.head) : 0.0f;
    const T* from = query_at<T>(p, sequence, row) + dim;
    load_slice<kAligned>(from, row.exists ? dims : 0).unpack_into(q[r]);
  }

  const CachePlace place(p, t.batch, p.by_page_size);
  const T* gK = keys_at<T>(p.k_cache, p.k_stride, sequence, t.head_k) + dim;
  const T* gV = keys_at<T>(p.v_cache, p.v_stride, sequence, t.head_k) + dim;
  for (int first = t.keys.begin; first < t.keys.end; first += kTeams * kKeys) {
    Slice<T> k[kKeys], v[kKeys];
#pragma unroll
    for (int n = 0; n < kKeys; n++) {
      const int key = first + n * kTeams + team;
      const bool exists = key < t.keys.end;
      const CachePlace::Position at = place.find(exists ? key : t.keys.begin);
      k[n] = load_slice<kAligned>(gK + offset_of(at, p.k_stride), exists ? dims : 0);
      v[n] = load_slice<kAligned>(gV + offset_of(at, p.v_stride), exists ? dims_v : 0);
    }

    float s[kRows][kKeys];
#pragma unroll
    for (int n = 0; n < kKeys; n++) {
      float x[kSlice];
      k[n].unpack_into(x);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        s[r][n] = 0;
#pragma unroll
        for (int i = 0; i < kSlice; i++) s[r][n] += q[r][i] * x[i];
#pragma unroll
        for (int apart = kLanes / 2; apart > 0; apart /= 2) {
          s[r][n] += __shfl_xor_sync(kAll, s[r][n], apart);
        }
      }
    }

#pragma unroll
    for (int r = 0; r < kRows; r++) {
      float row_max = states[r].row_max;
#pragma unroll
      for (int n = 0; n < kKeys; n++) {
        const int key = first + n * kTeams + team;
        const int distance = abs(query[r] + t.diagonal - key);
        s[r][n] = t.sees(query[r], key) ? score(s[r][n], slope[r], distance, p) : -INFINITY;
        row_max = fmaxf(row_max, s[r][n]);
      }
      const float scale = exp_of(states[r].row_max - row_max);
      states[r].row_max = row_max;
      states[r].row_sum *= scale;
#pragma unroll
      for (int i = 0; i < kSlice; i++) out[r][i] *= scale;
    }

#pragma unroll
    for (int n = 0; n < kKeys; n++) {
      float x[kSlice];
      v[n].unpack_into(x);
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        if (s[r][n] == -INFINITY) continue;  // not seen: 0 · v would be NaN for a v that is
        const float weight = exp_of(s[r][n] - states[r].row_max);
        states[r].row_sum += weight;
#pragma unroll
        for (int i = 0; i < kSlice; i++) out[r][i] += weight * x[i];
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; r++) {
#pragma unroll
    for (int i = 0; i < kSlice; i++) sOut[out_index<kRows, kDims>(team, r, dim + i)] = out[r][i];
    if (dim == 0) sStates[team * kRows + r] = states[r];
  }
  __syncthreads();
  write_tile<T, Scores::kPlain, false, kTeams, kRows, kDims>(p, t, sOut, sStates);
}

// Merges the splits of a row in their order, one warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    attn_decode_combine_kernel(const __grid_constant__ KernelParams p) {
  const int64_t index = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (index >= p.batch * p.heads_q * p.seqlen_q) return;
  const int query = int(index % p.seqlen_q), head = int(index / p.seqlen_q % p.heads_q);
  const int64_t b = index / p.seqlen_q / p.heads_q;
  const Sequence s = sequence_at(p, b);
  if (query >= s.seqlen_q) return;
  const RowState* states = p.partial_states + index * p.splits;
  const float* partial = p.partial_out + index * p.splits * p.head_dim_v;

  RowState total;
  for (int n = 0; n < p.splits; n++) total.row_max = fmaxf(total.row_max, states[n].row_max);
  for (int n = 0; n < p.splits; n++) {
    total.row_sum += states[n].row_sum * exp_of(states[n].row_max - total.row_max);
  }
  const int lane = threadIdx.x % 32;
  const float factor = Finish(p, b, head, s.q_row + query, total, lane == 0).factor;
  T* out = out_row<T>(p, b, head, s.q_row + query);
  for (int d = lane; d < p.head_dim_v; d += 32) {
    float sum = 0;
    for (int n = 0; n < p.splits; n++) {
      sum += exp_of(states[n].row_max - total.row_max) * partial[n * p.head_dim_v + d];
    }
    out[d] = from_float<T>(sum * factor);
  }
}

// Rows of q, K and V as vectors of 16 bytes, slices of kSlice elements.
bool aligned(const AttnDecodeParams& p) {
  const int64_t bytes = p.dtype == DType::kF32 ? 4 : 2;
  const auto begins_aligned = [&](const void* data, const Strides& stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride.batch * bytes % 16 == 0 &&
           stride.seq * bytes % 16 == 0 && stride.head * bytes % 16 == 0;
  };
  return p.head_dim % kSlice == 0 && p.head_dim_v % kSlice == 0 &&
         begins_aligned(p.q, p.q_stride) && begins_aligned(p.k_cache, p.k_stride) &&
         begins_aligned(p.v_cache, p.v_stride);
}

// That of the tensor cores' kernel, or null where there is none.
auto mma_launcher(DType dtype, const Device& device) -> decltype(&launch_sm80) {
  if (dtype == DType::kF32) return nullptr;
  if constexpr (has_kernels(80)) {
    if (device.arch >= 80) return launch_sm80;
  }
  if constexpr (has_kernels(75)) {
    if (device.arch < 80 && dtype == DType::kF16) return launch_sm75;
  }
  return nullptr;
}

bool has_products(const AttnDecodeParams& p, const Device& device) {
  return std::max(p.head_dim, p.head_dim_v) <= kMmaMaxDims && mma_launcher(p.dtype, device);
}

// A tile's rows: one, four, or the 16 of tensor cores.
int tile_rows(const AttnDecodeParams& p, const Device& device) {
  const int64_t rows = p.heads_q / p.heads_k * p.seqlen_q;
  if (is_rich(p)) return kMmaRows;
  if (!aligned(p)) return 4;
  return rows == 1 ? 1 : rows > 4 && has_products(p, device) ? kMmaRows : 4;
}

int64_t row_tiles(const AttnDecodeParams& p, const Device& device) {
  const int64_t rows = p.heads_q / p.heads_k * p.seqlen_q, tile = tile_rows(p, device);
  return (rows + tile - 1) / tile;
}

// Four blocks fit on an SM. Their number is all that is known here: lengths are on the device.
int choose_splits(const AttnDecodeParams& p, const Device& device) {
  if (p.num_splits > 0) return int(std::min<int64_t>(p.num_splits, kMaxSplits));
  const int64_t blocks = std::max<int64_t>(1, p.batch * p.heads_k * row_tiles(p, device));
  const int64_t wanted = 4 * int64_t(device.multiprocessors);
  return blocks * 2 > wanted ? 1 : int(std::min<int64_t>(wanted / blocks, kMaxSplits));
}

template <class T, int kLanes, int kRows, bool kAligned>
void launch_tiles(const KernelParams& p, const Device& device, const std::string& what) {
  const int shared = kThreads * kRows * kSlice * int(sizeof(float)) +
                     kThreads / kLanes * kRows * int(sizeof(RowState));
  const Grid grid{p.batch * p.heads_k * p.splits * p.row_tiles, 1, 1, kThreads, shared};
  launch(attn_decode_kernel<T, kLanes, kRows, kAligned>, grid, p, device, what);
}

template <class T, int kRows>
void launch_aligned(const KernelParams& p, const Device& device, const std::string& what) {
  const int64_t dims = std::max(p.head_dim, p.head_dim_v);
  if (dims <= 64) return launch_tiles<T, 8, kRows, true>(p, device, what);
  if (dims <= 128) return launch_tiles<T, 16, kRows, true>(p, device, what);
  launch_tiles<T, 32, kRows, true>(p, device, what);
}

template <class T>
void run(const KernelParams& p, const Device& device) {
  const std::string what = "attn_decode of (" + std::to_string(p.batch) + ", " +
                           std::to_string(p.seqlen_q) + ", " + std::to_string(p.heads_q) + ", " +
                           std::to_string(p.head_dim) + ")";
  const int rows = tile_rows(p, device);
  if (!aligned(p)) {
    launch_tiles<T, 32, 4, false>(p, device, what);
  } else if (rows == kMmaRows) {
    mma_launcher(p.dtype, device)(p, device, what);
  } else if (rows == 1) {
    launch_aligned<T, 1>(p, device, what);
  } else {
    launch_aligned<T, 4>(p, device, what);
  }
  if (p.splits > 1) {
    const int64_t all_rows = p.batch * p.heads_q * p.seqlen_q, warps = kThreads / 32;
    const Grid grid{(all_rows + warps - 1) / warps, 1, 1, kThreads};
    launch(attn_decode_combine_kernel<T>, grid, p, device, what + ", combine");
  }
}

}  // namespace decode

bool attn_decode_takes(const AttnDecodeParams& p, const Device& device) {
  return !decode::is_rich(p) || (decode::aligned(p) && decode::has_products(p, device));
}

int64_t attn_decode_workspace(const AttnDecodeParams& p, const Device& device) {
  const int64_t splits = decode::choose_splits(p, device);
  const int64_t rows = p.batch * p.heads_q * p.seqlen_q;
  const int64_t state = sizeof(decode::RowState) + p.head_dim_v * sizeof(float);
  return splits == 1 ? 0 : rows * splits * state;
}

void attn_decode(const AttnDecodeParams& p, void* workspace, const Device& device) {
  const int64_t rows = p.batch * p.heads_q * p.seqlen_q;
  if (rows == 0) return;
  decode::KernelParams params{};
  static_cast<AttnDecodeParams&>(params) = p;
  params.by_page_size = Divider::by(p.page_size);
  params.by_group_size = Divider::by(p.heads_q / p.heads_k);
  params.splits = decode::choose_splits(p, device);
  params.row_tiles = int(decode::row_tiles(p, device));
  params.partial_states = static_cast<decode::RowState*>(workspace);
  params.partial_out = reinterpret_cast<float*>(params.partial_states + rows * params.splits);
  with_dtype(p.dtype, [&](auto type) { decode::run<decltype(type)>(params, device); });
}

}  // namespace fastattn::cuda
