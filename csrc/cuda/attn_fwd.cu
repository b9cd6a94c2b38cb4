// Which kernel computes attention's forward on which architecture and dtype, and its workspace.
#include "../block_range.h"
#include "attn_fwd.h"
#include "generations.h"

namespace fastattn::cuda {

namespace {

// The keys are those of a cache, each as if just appended; or of a packed sequence.
AttnDecodeParams as_decode(const AttnFwdParams& p) {
  AttnDecodeParams d{};
  static_cast<ScoreParams&>(d) = p;
  d.dtype = p.dtype;
  d.batch = p.batch;
  d.heads_q = p.heads_q;
  d.heads_k = p.heads_k;
  d.seqlen_q = p.seqlen_q;
  d.seqlen_new = p.seqlen_k;
  d.head_dim = p.head_dim;
  d.head_dim_v = p.head_dim_v;
  d.q = p.q;
  d.q_stride = p.q_stride;
  d.k_cache = p.k;
  d.k_stride = p.k_stride;
  d.v_cache = p.v;
  d.v_stride = p.v_stride;
  d.out = p.out;
  d.out_stride = p.out_stride;
  d.lse = p.lse;
  d.lse_stride_batch = p.lse_stride_batch;
  d.lse_stride_head = p.lse_stride_head;
  d.cu_seqlens_q = p.cu_seqlens_q;
  d.cu_seqlens_k = p.cu_seqlens_k;
  d.window_left = p.window_left;
  d.window_right = p.window_right;
  d.sinks = p.sinks;
  return d;
}

// Few queries of many keys, if the kernels for decoding take their scores. A forward kernel has one
// block of threads for a head's tile of queries, those split the keys among blocks, and read keys
// once for all query heads of a group: up to 16 rows, a tile of theirs, in any case. More rows mean
// more tiles that read the same keys from L2, which pays while SMs would have nothing to do; head
// dims over 128 have no tensor cores there. fastattn/backend_cuda.py tells users.
bool decodes(const AttnFwdParams& p, const Device& device) {
  constexpr int64_t kFewRows = 16, kMostRows = 512, kManyKeys = 512;
  if (p.seqlen_k < kManyKeys || !attn_decode_takes(as_decode(p), device)) return false;
  const int64_t rows = p.heads_q / p.heads_k * p.seqlen_q;
  const int64_t tiles = p.batch * p.heads_q * ceil_div(p.seqlen_q, 128);
  return rows <= kFewRows || (rows <= kMostRows && greater(p.head_dim, p.head_dim_v) <= 128 &&
                              2 * tiles <= device.multiprocessors);
}

}  // namespace

int64_t attn_fwd_workspace(const AttnFwdParams& p, const Device& device) {
  return decodes(p, device) ? attn_decode_workspace(as_decode(p), device) : 0;
}

void attn_fwd(const AttnFwdParams& p, void* workspace, const Device& device) {
  if (decodes(p, device)) return attn_decode(as_decode(p), workspace, device);
  if (p.dtype == DType::kF32) return attn_fwd_fp32(p, device);
  if constexpr (has_kernels(90)) {
    if (device.arch == 90 && attn_fwd_sm90_takes(p)) return attn_fwd_sm90(p, device);
  }
  if constexpr (has_kernels(80)) {
    if (device.arch >= 80) return attn_fwd_sm80(p, device);
  }
  if constexpr (has_kernels(75)) {
    if (device.arch < 80 && p.dtype == DType::kF16) return attn_fwd_sm75(p, device);
  }
  throw_no_kernel("attn_fwd", p.dtype, device);
}

}  // namespace fastattn::cuda
