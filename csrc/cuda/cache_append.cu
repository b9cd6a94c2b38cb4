// Appends new keys, rotated, and values to the KV cache: position cache_seqlens[b] + i gets new
// token i. One block a token; neighbouring threads take neighbouring elements.
#include "kv_cache.cuh"
#include "launch.cuh"
#include "vector.cuh"

namespace fastattn::cuda {
namespace cache_append_kernel {

constexpr int kThreads = 128;

struct KernelParams : CacheAppendParams {
  Divider by_page_size;
};

FASTATTN_DEVICE float load_as_float(const void* table, int64_t i, DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return to_float(static_cast<const bf16*>(table)[i]);
    case DType::kF16:
      return to_float(static_cast<const fp16*>(table)[i]);
    default:
      return static_cast<const float*>(table)[i];
  }
}

// Element `unit` of a new key: the unit-th pair turned by its angle (see "RoFormer", 2021), or one
// of the elements behind the rotary dims.
template <class T>
FASTATTN_DEVICE void append_key(const T* src, int unit, int64_t position, const KernelParams& p,
                                T* dst) {
  const int pairs = p.rotary_cos ? int(p.rotary_dim / 2) : 0;
  if (unit >= pairs) {
    dst[unit + pairs] = src[unit + pairs];
    return;
  }
  const int first = p.rotary_interleaved ? 2 * unit : unit;
  const int second = p.rotary_interleaved ? first + 1 : first + pairs;
  const int64_t angle = position * p.rotary_stride + unit;
  const float cos = load_as_float(p.rotary_cos, angle, p.rotary_dtype);
  const float sin = load_as_float(p.rotary_sin, angle, p.rotary_dtype);
  const float a = to_float(src[first]), b = to_float(src[second]);
  dst[first] = from_float<T>(a * cos - b * sin);
  dst[second] = from_float<T>(a * sin + b * cos);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cache_append_kernel(const __grid_constant__ KernelParams p) {
  const int64_t b = blockIdx.x / p.seqlen_new, i = blockIdx.x % p.seqlen_new;
  const int position = p.cache_seqlens[b] + int(i);
  const CachePlace::Position at = CachePlace(p, b, p.by_page_size).find(position);
  const T* k = static_cast<const T*>(p.k_new) + b * p.k_new_stride.batch + i * p.k_new_stride.seq;
  const T* v = static_cast<const T*>(p.v_new) + b * p.v_new_stride.batch + i * p.v_new_stride.seq;
  T* k_cache = static_cast<T*>(p.k_cache) + offset_of(at, p.k_stride);
  T* v_cache = static_cast<T*>(p.v_cache) + offset_of(at, p.v_stride);

  const int pairs = p.rotary_cos ? int(p.rotary_dim / 2) : 0;
  const int units = int(p.head_dim) - pairs, heads = int(p.heads_k);  // of a key
  for (int n = threadIdx.x; n < heads * units; n += kThreads) {
    const int h = n / units;
    append_key(k + h * p.k_new_stride.head, n % units, position, p, k_cache + h * p.k_stride.head);
  }
  const int dims = int(p.head_dim_v);
  for (int n = threadIdx.x; n < heads * dims; n += kThreads) {
    const int h = n / dims, d = n % dims;
    v_cache[h * p.v_stride.head + d] = v[h * p.v_new_stride.head + d];
  }
}

}  // namespace cache_append_kernel

void cache_append(const CacheAppendParams& p, const Device& device) {
  with_dtype(p.dtype, [&](auto type) {
    const Grid grid{p.batch * p.seqlen_new, 1, 1, cache_append_kernel::kThreads};
    launch(cache_append_kernel::cache_append_kernel<decltype(type)>, grid,
           cache_append_kernel::KernelParams{p, Divider::by(p.page_size)}, device,
           "cache_append of " + std::to_string(p.seqlen_new) + " to " + std::to_string(p.batch) +
               " sequences");
  });
}

}  // namespace fastattn::cuda
