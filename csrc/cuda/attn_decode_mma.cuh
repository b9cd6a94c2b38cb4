// Decoding with tensor cores: tiles of 16 rows, fp16 or bf16, aligned, D and D_v up to 128. Five
// rows and more are too many for attn_decode.cu to hide behind memory: 8 heads of a group, say.
//
// Each warp goes through 16 keys at a time, every fourth such step of its block's split, with a
// softmax state of its own. Nothing passes through shared memory until the end: a lane loads 16
// bytes of a row of K or V, 8 lanes or 4 a run of memory, and these already are operands B, as the
// order of what is summed over is free, and so is that of result columns (lane = 4·group + t):
//
//   S = Q·Kᵀ  a lane holds d = 32c + 8t … 8t + 7 of key `group`: words 0 and 1 stand for
//             k = (2t, 2t + 1), (2t + 8, 2t + 9) of one product, 2 and 3 of the next. Q alike.
//   O = P·V   a lane holds d = 64u + 8·group … + 7 of keys 2t, 2t + 1, 2t + 8, 2t + 9: element c of
//             two of them is a word of result column `group` of tile c, d = 64u + 8·group + c.
#pragma once

#include "attn_decode.cuh"
#include "fragments.cuh"

namespace fastattn::cuda::decode {

constexpr int kMmaKeys = 16;  // that a warp takes at a time

FASTATTN_DEVICE uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Element c of two rows side by side.
FASTATTN_DEVICE uint32_t pair(const uint4& low, const uint4& high, int c) {
  const uint32_t a = word(low, c / 2), b = word(high, c / 2);
  return c % 2 == 0 ? (a & 0xffff) | b << 16 : a >> 16 | (b & 0xffff0000);
}

template <class Arch, class T, int kDims, Scores kScores>
static __global__ void __launch_bounds__(kThreads, kDims == 64 ? 3 : 2)
    attn_decode_mma_kernel(const __grid_constant__ KernelParams p) {
  constexpr int kWarps = kThreads / 32, kChunks = kDims / 32, kHalves = kDims / 64;
  FASTATTN_SHARED(memory);
  float* sOut = reinterpret_cast<float*>(memory);  // see out_index
  RowState* sStates = reinterpret_cast<RowState*>(sOut + kWarps * kMmaRows * kDims);

  const Tile tile = Tile::of_block<kMmaRows>(p);
  const Sequence sequence = sequence_at(p, tile.batch);
  const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int dims = int(p.head_dim), dims_v = int(p.head_dim_v);

  // Of rows group and group + 8.
  uint4 q[2][kChunks];
  RowState states[2];  // row_sum: this lane's part
  const Row rows[2] = {{tile, group, p, sequence}, {tile, group + 8, p, sequence}};
  const RowScores<T, kScores> score[2] = {{p, tile, sequence, rows[0]},
                                          {p, tile, sequence, rows[1]}};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const Row& row = rows[h];
    const T* from = query_at<T>(p, sequence, row);
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      const int d = 32 * c + 8 * t;
      q[h][c] = load_slice<true>(from + d, row.exists ? dims - d : 0).vectors[0];
    }
  }

  float out[kHalves][8][4] = {};
  const CachePlace place(p, tile.batch, p.by_page_size);
  const T* gK = keys_at<T>(p.k_cache, p.k_stride, sequence, tile.head_k);
  const T* gV = keys_at<T>(p.v_cache, p.v_stride, sequence, tile.head_k);
  for (int first = tile.keys.begin + kMmaKeys * warp; first < tile.keys.end;
       first += kMmaKeys * kWarps) {
    uint4 k[2][kChunks], v[4][kHalves];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int key = first + 8 * n + group;
      const bool exists = key < tile.keys.end;
      const T* row = gK + offset_of(place.find(exists ? key : first), p.k_stride);
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        const int d = 32 * c + 8 * t;
        k[n][c] = load_slice<true>(row + d, exists ? dims - d : 0).vectors[0];
      }
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int key = first + n / 2 * 8 + 2 * t + n % 2;
      const bool exists = key < tile.keys.end;
      const T* row = gV + offset_of(place.find(exists ? key : first), p.v_stride);
#pragma unroll
      for (int u = 0; u < kHalves; u++) {
        const int d = 64 * u + 8 * group;
        v[n][u] = load_slice<true>(row + d, exists ? dims_v - d : 0).vectors[0];
      }
    }

    float s[2][4] = {};  // rows group, group + 8; keys 8n + 2t, 8n + 2t + 1
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        const uint4 a = q[0][c], b = q[1][c];
        mma(Arch{}, T{}, s[n], {a.x, b.x, a.y, b.y}, k[n][c].x, k[n][c].y);
        mma(Arch{}, T{}, s[n], {a.z, b.z, a.w, b.w}, k[n][c].z, k[n][c].w);
      }
    }

    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float row_max = states[h].row_max;
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          const int key = first + 8 * n + 2 * t + e % 2;
          s[n][e] = tile.sees(rows[h].query, key) ? score[h](s[n][e], key) : -INFINITY;
          row_max = fmaxf(row_max, s[n][e]);
        }
      }
      row_max = quad_max(row_max);
      scale[h] = exp_of(states[h].row_max - row_max);
      states[h].row_max = row_max;
      states[h].row_sum *= scale[h];
#pragma unroll
      for (int n = 0; n < 2; n++) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          s[n][e] = exp_of(s[n][e] - row_max);
          states[h].row_sum += s[n][e];
          if (!score[h].keeps(first + 8 * n + 2 * t + e % 2)) s[n][e] = 0.0f;
        }
      }
    }

    uint32_t weights[4];
    pack_a(weights, s, 0, T{});
#pragma unroll
    for (int u = 0; u < kHalves; u++) {
#pragma unroll
      for (int c = 0; c < 8; c++) {
#pragma unroll
        for (int e = 0; e < 4; e++) out[u][c][e] *= scale[e / 2];
        mma(Arch{}, T{}, out[u][c], weights, pair(v[0][u], v[1][u], c), pair(v[2][u], v[3][u], c));
      }
    }
  }

  const float kept = kept_scale<kScores>(p);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = group + 8 * h;
    states[h].row_sum = quad_sum(states[h].row_sum);
    if (t == 0) sStates[warp * kMmaRows + row] = states[h];
#pragma unroll
    for (int u = 0; u < kHalves; u++) {
#pragma unroll
      for (int c = 0; c < 8; c++) {
        const int d = 64 * u + 16 * t + c;  // of result column 2t; 8 more of 2t + 1
        sOut[out_index<kMmaRows, kDims>(warp, row, d)] = out[u][c][2 * h] * kept;
        sOut[out_index<kMmaRows, kDims>(warp, row, d + 8)] = out[u][c][2 * h + 1] * kept;
      }
    }
  }
  __syncthreads();
  write_tile<T, kScores, true, kWarps, kMmaRows, kDims>(p, tile, sOut, sStates);
}

template <class Arch, class T, int kDims, Scores kScores>
void launch_mma(const KernelParams& p, const Device& device, const std::string& what) {
  constexpr int kShared =
      kThreads / 32 * kMmaRows * (kDims * int(sizeof(float)) + int(sizeof(RowState)));
  const Grid grid{p.batch * p.heads_k * p.splits * p.row_tiles, 1, 1, kThreads, kShared};
  launch(attn_decode_mma_kernel<Arch, T, kDims, kScores>, grid, p, device, what);
}

template <class Arch, class T, int kDims>
void launch_mma(const KernelParams& p, const Device& device, const std::string& what) {
  if (is_rich(p)) return launch_mma<Arch, T, kDims, Scores::kRich>(p, device, what);
  launch_mma<Arch, T, kDims, Scores::kPlain>(p, device, what);
}

template <class Arch, class T>
void launch_mma(const KernelParams& p, const Device& device, const std::string& what) {
  if (p.head_dim <= 64 && p.head_dim_v <= 64) return launch_mma<Arch, T, 64>(p, device, what);
  return launch_mma<Arch, T, 128>(p, device, what);
}

}  // namespace fastattn::cuda::decode
