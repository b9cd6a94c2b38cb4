// Appends new keys, rotated, and values to the KV cache: position cache_seqlens[b] + i gets new
// token i.
namespace cache_append_kernel {

constexpr int64_t kMaxPairs = 128;  // half of the largest head dim

// dst = src with its pairs turned by the angles whose cosines and sines these are; see "RoFormer",
// 2021.
template <class T>
void rotate(const T* src, const float* cos, const float* sin, const CacheAppendParams& p, T* dst) {
  const int64_t pairs = p.rotary_dim / 2;
  const int64_t step = p.rotary_interleaved ? 2 : 1, apart = p.rotary_interleaved ? 1 : pairs;
  for (int64_t i = 0; i < pairs; i++) {
    const float a = to_float(src[i * step]), b = to_float(src[i * step + apart]);
    from_float(a * cos[i] - b * sin[i], dst + i * step);
    from_float(a * sin[i] + b * cos[i], dst + i * step + apart);
  }
  std::copy(src + 2 * pairs, src + p.head_dim, dst + 2 * pairs);
}

template <class T>
void append_token(const CacheAppendParams& p, int64_t b, int64_t i) {
  const int64_t position = p.cache_seqlens[b] + i;
  float cos[kMaxPairs], sin[kMaxPairs];
  if (p.rotary_cos) {
    with_dtype(p.rotary_dtype, [&](auto type) {
      using Table = decltype(type);
      const auto* cos_row = static_cast<const Table*>(p.rotary_cos) + position * p.rotary_stride;
      const auto* sin_row = static_cast<const Table*>(p.rotary_sin) + position * p.rotary_stride;
      for (int64_t d = 0; d < p.rotary_dim / 2; d++) {
        cos[d] = to_float(cos_row[d]);
        sin[d] = to_float(sin_row[d]);
      }
    });
  }
  const T* k = static_cast<const T*>(p.k_new) + b * p.k_new_stride.batch + i * p.k_new_stride.seq;
  const T* v = static_cast<const T*>(p.v_new) + b * p.v_new_stride.batch + i * p.v_new_stride.seq;
  const CachePlace place(p, b);
  T* k_cache = static_cast<T*>(p.k_cache) + place.offset(position, p.k_stride);
  T* v_cache = static_cast<T*>(p.v_cache) + place.offset(position, p.v_stride);
  for (int64_t h = 0; h < p.heads_k; h++) {
    rotate(k + h * p.k_new_stride.head, cos, sin, p, k_cache + h * p.k_stride.head);
    const T* value = v + h * p.v_new_stride.head;
    std::copy(value, value + p.head_dim_v, v_cache + h * p.v_stride.head);
  }
}

}  // namespace cache_append_kernel

static void cache_append(const CacheAppendParams& p, const Pool& pool) {
  with_dtype(p.dtype, [&](auto type) {
    pool.run(p.batch * p.seqlen_new, [&](int64_t task) {
      cache_append_kernel::append_token<decltype(type)>(p, task / p.seqlen_new,
                                                        task % p.seqlen_new);
    });
  });
}
