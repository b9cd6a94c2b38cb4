// Cross-entropy of (N, V) logits x: loss, lse and the gradient, one block a row. With z = x, or
// softcap·tanh(x / softcap),
//
//   m = max z,  l = Σ exp(z − m),  lse = m + log l,  nll_c = log l − (z_c − m)
//   loss = (1 − ε)·w_y·nll_y + ε/V·Σ_c w_c·nll_c + z_loss·lse²
//   dz_c = p_c·a − [c = y]·t − s·w_c     where p_c = exp(z_c − m) / l, g = dloss of the row,
//          t = g·(1 − ε)·w_y,  s = g·ε/V,  a = t + s·Σ w + 2·g·z_loss·lse + dlse
//
// Only memory counts. Every thread keeps an online softmax of the vectors it has read, the block
// merges these, and the same threads come back to the same vectors for the gradient. Meanwhile a
// row stays in shared memory as far as it fits; the rest comes from L2, last read first. Bytes a
// row of b-byte logits moves:
//
//   loss alone       V·b read
//   with gradient    V·b read, V·b written, which is the least there is; and from L2 what shared
//                    memory doesn't hold: of 128256 bf16 logits 30 KB on sm_90, 94 KB on sm_80,
//                    187 KB on sm_75. Rows in flight times that is 4, 10 and 7.5 MB; the L2s hold
//                    50, 40 and 4. On sm_75 alone such a row is in part read from memory twice.
//   gradient alone   the same: p takes m and l from the logits. A saved lse can't serve, for at an
//                    offset of 2²⁴ it is rounded by 1, and exp(z − lse) wrong by a factor e.
//
// Plain rows have z = x and ε = 0: neither class weights nor the z-loss touch their inner loops.
// All others are rich.
//
// The gradient of fp32 logits may be bf16 or fp16, beside them: what products then read.
#include <cassert>
#include <cfloat>
#include <cmath>
#include <algorithm>

#include "launch.cuh"
#include "vector.cuh"

namespace fastattn::cuda {
namespace cross_entropy {

// Two blocks of 512 may then have 64 registers a thread, and one block of 512 alone on an SM has
// 32 KiB of loads under way, about what memory's latency hides on sm_90.
constexpr int kMaxThreads = 512;
template <bool kRich>                   // rich rows are bound by arithmetic, and need the registers
constexpr int kUnroll = kRich ? 2 : 4;  // vectors of 16 bytes that a thread loads at a time
constexpr int kVectorsPerThread = 8;    // of a row, up to kMaxThreads
constexpr int kMaxWarps = kMaxThreads / 32;

struct KernelParams : CrossEntropyParams {
  int held;  // vectors of a row that stay in shared memory
};

struct RowStats {
  float max = -FLT_MAX;  // of z; finite even if all are −inf so far: −inf − max must not be NaN
  float sum = 0;         // Σ exp(z − max)
  float smooth = 0;      // rich: Σ w·(z − max)
  float weight = 0;      // rich: Σ w
};

constexpr int kStatsBytes = kMaxWarps * int(sizeof(RowStats));  // shared; the row held follows

// What a row's gradient is made of.
struct Gradient {
  float row_max, a_over_l, s;
};

// Columns of a row: whole vectors, aligned to 16 bytes, of which a thread takes every blockDim-th;
// and edges, the few columns before and behind them, at most one a thread.
template <class T>
struct Columns {
  int before, edges, vectors;

  FASTATTN_DEVICE Columns(const T* x, int64_t vocab) {
    const int64_t to_boundary = (16 - misalignment(x)) % 16 / int(sizeof(T));
    before = int(min(vocab, to_boundary));
    vectors = int((vocab - before) / kVec<T>);
    edges = int(vocab - int64_t(vectors) * kVec<T>);
  }
  FASTATTN_DEVICE int64_t vector(int v) const { return before + int64_t(v) * kVec<T>; }
  FASTATTN_DEVICE int64_t edge(int e) const {
    return e < before ? e : vector(vectors) + e - before;
  }
};

template <bool kRich>
FASTATTN_DEVICE float capped(float x, float cap) {
  return kRich && cap > 0 ? cap * tanhf(x / cap) : x;
}

// Adds N neighbouring logits and their class weights (null = 1) to the statistics.
template <bool kRich, int N>
FASTATTN_DEVICE void add(const float (&x)[N], const float* weight, float cap, RowStats& row) {
  float z[N], most = row.max;
#pragma unroll
  for (int i = 0; i < N; i++) {
    z[i] = capped<kRich>(x[i], cap);
    most = fmaxf(most, z[i]);
  }
  if (most > row.max) {  // seldom, after the first few
    const float shift = row.max - most;
    row.sum *= exp_of(shift);
    if (kRich) row.smooth += row.weight * fmaxf(shift, -FLT_MAX);  // 0 · −inf would be NaN
    row.max = most;
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    row.sum += exp_of(z[i] - row.max);
    if (kRich) {
      const float w = weight ? weight[i] : 1.0f;
      row.smooth += w * (z[i] - row.max);
      row.weight += w;
    }
  }
}

// Brings statistics to a larger maximum.
template <bool kRich>
FASTATTN_DEVICE RowStats raised(RowStats row, float max) {
  const float shift = row.max - max;
  row.sum *= exp_of(shift);
  if (kRich) row.smooth += row.weight * fmaxf(shift, -FLT_MAX);
  row.max = max;
  return row;
}

// The statistics of all threads, the same bits in each.
template <bool kRich>
FASTATTN_DEVICE RowStats merged(RowStats row, RowStats* sWarps) {
  constexpr unsigned kAll = 0xffffffff;
  float max = row.max;
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) max = fmaxf(max, __shfl_xor_sync(kAll, max, apart));
  row = raised<kRich>(row, max);
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) {
    row.sum += __shfl_xor_sync(kAll, row.sum, apart);
    if (kRich) {
      row.smooth += __shfl_xor_sync(kAll, row.smooth, apart);
      row.weight += __shfl_xor_sync(kAll, row.weight, apart);
    }
  }

  if (threadIdx.x % 32 == 0) sWarps[threadIdx.x / 32] = row;
  __syncthreads();
  const int warps = blockDim.x / 32;
  RowStats total;
  for (int w = 0; w < warps; w++) total.max = fmaxf(total.max, sWarps[w].max);
  for (int w = 0; w < warps; w++) {
    const RowStats other = raised<kRich>(sWarps[w], total.max);
    total.sum += other.sum;
    total.smooth += other.smooth;
    total.weight += other.weight;
  }
  if (total.sum == 0) total.sum = NAN;  // every logit is −inf: no distribution, as in eager
  return total;
}

// Statistics of what this thread reads of a row, which it also puts into sRow as far as held.
template <bool kRich, class T>
FASTATTN_DEVICE RowStats read_row(const T* x, const Columns<T>& columns, const KernelParams& p,
                                  uint4* sRow) {
  const int threads = blockDim.x;
  const auto weight_at = [&](int64_t c) { return kRich && p.weight ? p.weight + c : nullptr; };
  RowStats row;
  if (int(threadIdx.x) < columns.edges) {
    const int64_t c = columns.edge(threadIdx.x);
    const float edge[1] = {to_float(x[c])};
    add<kRich>(edge, weight_at(c), p.softcap, row);
  }
  for (int first = threadIdx.x; first < columns.vectors; first += kUnroll<kRich> * threads) {
    uint4 loaded[kUnroll<kRich>];
#pragma unroll
    for (int u = 0; u < kUnroll<kRich>; u++) {
      const int v = first + u * threads;
      if (v < columns.vectors) loaded[u] = load_vector(x + columns.vector(v));
    }
#pragma unroll
    for (int u = 0; u < kUnroll<kRich>; u++) {
      const int v = first + u * threads;
      if (v >= columns.vectors) break;
      if (v < p.held) sRow[v] = loaded[u];
      float values[kVec<T>];
      unpack<T>(loaded[u], values);
      add<kRich>(values, weight_at(columns.vector(v)), p.softcap, row);
    }
  }
  return row;
}

template <bool kRich>
FASTATTN_DEVICE float gradient(float x, const float* weight, float cap, const Gradient& g) {
  if (!kRich) return g.a_over_l * exp_of(x - g.row_max);
  const float w = weight ? *weight : 1.0f;
  if (!(cap > 0)) return g.a_over_l * exp_of(x - g.row_max) - g.s * w;
  const float t = tanhf(x / cap);
  return (1 - t * t) * (g.a_over_l * exp_of(cap * t - g.row_max) - g.s * w);
}

// The gradient's neighbours of a vector of logits, at an address that is a multiple of their size.
template <class T, class TGrad>
FASTATTN_DEVICE void store_gradient(TGrad* dx, const float (&values)[kVec<T>]) {
  if constexpr (sizeof(T) == sizeof(TGrad)) {
    store_vector(dx, pack<TGrad>(values));
  } else {
    *reinterpret_cast<uint2*>(dx) = {ptx::pack(values[0], values[1], TGrad{}),
                                     ptx::pack(values[2], values[3], TGrad{})};
  }
}

// Writes the gradient but for the target's own term, every thread where it has read. dx may be x.
template <bool kRich, class T, class TGrad>
FASTATTN_DEVICE void write_gradient(const T* x, const Columns<T>& columns, const KernelParams& p,
                                    const uint4* sRow, const Gradient& g, TGrad* dx) {
  const int threads = blockDim.x, step = kUnroll<kRich> * threads;
  const auto weight_at = [&](int64_t c) { return kRich && p.weight ? p.weight + c : nullptr; };
  const bool alike = misalignment(dx + columns.before) % int(sizeof(TGrad) * kVec<T>) == 0;
  if (int(threadIdx.x) < columns.edges) {
    const int64_t c = columns.edge(threadIdx.x);
    dx[c] = from_float<TGrad>(gradient<kRich>(to_float(x[c]), weight_at(c), p.softcap, g));
  }
  for (int first = columns.vectors / step * step + threadIdx.x; first >= 0; first -= step) {
    uint4 loaded[kUnroll<kRich>];
#pragma unroll
    for (int u = 0; u < kUnroll<kRich>; u++) {
      const int v = first + u * threads;
      if (v < columns.vectors)
        loaded[u] = v < p.held ? sRow[v] : load_vector(x + columns.vector(v));
    }
#pragma unroll
    for (int u = 0; u < kUnroll<kRich>; u++) {
      const int v = first + u * threads;
      if (v >= columns.vectors) break;
      const int64_t c = columns.vector(v);
      const float* weight = weight_at(c);
      float values[kVec<T>];
      unpack<T>(loaded[u], values);
#pragma unroll
      for (int i = 0; i < kVec<T>; i++) {
        values[i] = gradient<kRich>(values[i], weight ? weight + i : nullptr, p.softcap, g);
      }
      if (alike) {
        store_gradient<T>(dx + c, values);
      } else {
#pragma unroll
        for (int i = 0; i < kVec<T>; i++) dx[c + i] = from_float<TGrad>(values[i]);
      }
    }
  }
}

template <class T>
FASTATTN_DEVICE void fill_zero(T* dx, int64_t vocab) {
  const Columns<T> columns(dx, vocab);
  if (int(threadIdx.x) < columns.edges) dx[columns.edge(threadIdx.x)] = T{};
  for (int v = threadIdx.x; v < columns.vectors; v += blockDim.x) {
    store_vector(dx + columns.vector(v), uint4{0, 0, 0, 0});
  }
}

// Loss and lse of row blockIdx.x where p.loss is set, its gradient where p.dlogits is.
template <class T, class TGrad, bool kRich>
__global__ void __launch_bounds__(kMaxThreads, 2)
    cross_entropy_kernel(const __grid_constant__ KernelParams p) {
  FASTATTN_SHARED(memory);
  RowStats* sWarps = reinterpret_cast<RowStats*>(memory);
  uint4* sRow = reinterpret_cast<uint4*>(memory + kStatsBytes);
  const int64_t r = blockIdx.x;
  const T* x = static_cast<const T*>(p.logits) + r * p.logits_stride;
  TGrad* dx = p.dlogits ? static_cast<TGrad*>(p.dlogits) + r * p.dlogits_stride : nullptr;
  const int64_t target = p.target[r];
  const bool ignored = target == p.ignore_index;
  assert(ignored || (target >= 0 && target < p.vocab));
  const float dlse = p.dlse ? p.dlse[r] : 0.0f;
  const bool no_gradient = ignored && dlse == 0;
  if (no_gradient && !p.loss) return fill_zero(dx, p.vocab);

  const Columns<T> columns(x, p.vocab);
  const RowStats mine = read_row<kRich>(x, columns, p, sRow);
  const float x_y = ignored ? 0.0f : to_float(x[target]);  // before the gradient takes its place
  const RowStats row = merged<kRich>(mine, sWarps);

  const float log_sum = logf(row.sum), lse = row.max + log_sum;
  float nll = 0, weight = 0, slope = 1;  // of the target; slope = dz/dx
  if (!ignored) {
    const float z = capped<kRich>(x_y, p.softcap);
    if (kRich && p.softcap > 0) slope = 1 - (z / p.softcap) * (z / p.softcap);
    nll = log_sum - (z - row.max);
    weight = p.weight ? p.weight[target] : 1.0f;
  }
  const float hard = (1 - p.label_smoothing) * weight, soft = p.label_smoothing / float(p.vocab);
  if (p.loss && threadIdx.x == 0) {
    float loss = hard * nll;
    if (kRich && p.label_smoothing > 0) loss += soft * (row.weight * log_sum - row.smooth);
    if (p.z_loss != 0) loss += p.z_loss * lse * lse;
    p.loss[r] = ignored ? 0.0f : loss;
    p.lse[r] = lse;
  }
  if (!dx) return;
  if (no_gradient) return fill_zero(dx, p.vocab);

  const float g = ignored ? 0.0f : p.dloss[r * p.dloss_stride];
  const float t = g * hard, s = g * soft;
  const float u = (p.z_loss != 0 ? 2 * g * p.z_loss * lse : 0.0f) + dlse;
  const float smooth_weight = kRich ? s * row.weight : 0.0f;
  write_gradient<kRich>(x, columns, p, sRow,
                        Gradient{row.max, (t + smooth_weight + u) / row.sum, s}, dx);
  __syncthreads();  // the target's column has its owner's value
  if (threadIdx.x == 0 && !ignored) {
    // In terms that don't cancel where p_y is near 1: p_y − 1 = exp(−nll) − 1.
    const float p_y = expf(-nll);
    const float smooth = kRich ? smooth_weight * p_y - s * weight : 0.0f;
    dx[target] = from_float<TGrad>(slope * (t * expm1f(-nll) + smooth + u * p_y));
  }
}

template <class T, class TGrad>
void run_as(const CrossEntropyParams& p, const Device& device) {
  const int64_t vectors = p.vocab / kVec<T>;
  int threads = 32;
  while (threads < kMaxThreads && threads * kVectorsPerThread < vectors) threads *= 2;
  const int64_t room = (device.shared_bytes - kStatsBytes) / int64_t(sizeof(uint4));
  const int held = p.dlogits ? int(std::min(vectors, room)) : 0;
  const Grid grid{p.rows, 1, 1, threads, kStatsBytes + held * int(sizeof(uint4))};

  const bool rich = p.softcap > 0 || p.label_smoothing > 0;
  launch(rich ? cross_entropy_kernel<T, TGrad, true> : cross_entropy_kernel<T, TGrad, false>, grid,
         KernelParams{p, held}, device,
         "cross_entropy of (" + std::to_string(p.rows) + ", " + std::to_string(p.vocab) + ")");
}

void run(const CrossEntropyParams& p, const Device& device) {
  const DType gradient = p.dlogits ? p.dlogits_dtype : p.dtype;
  with_dtype(gradient, [&](auto type) {
    using TGrad = decltype(type);
    if (p.dtype == gradient) return run_as<TGrad, TGrad>(p, device);
    if constexpr (!std::is_same_v<TGrad, float>) run_as<float, TGrad>(p, device);
  });
}

}  // namespace cross_entropy

void cross_entropy_fwd(const CrossEntropyParams& p, const Device& device) {
  cross_entropy::run(p, device);
}
void cross_entropy_bwd(const CrossEntropyParams& p, const Device& device) {
  CrossEntropyParams gradient_alone = p;
  gradient_alone.loss = nullptr;
  cross_entropy::run(gradient_alone, device);
}

}  // namespace fastattn::cuda
