// The one file that knows tensors: private operators take them, fill a params struct and start a
// kernel.
//
// It is compiled once for each library: fastattn_C (with bindings_cpu.h), fastattn_cuda
// (FASTATTN_CUDA: bindings_cuda.h), and the tests' fastattn_emulated (FASTATTN_EMULATE too). Those
// headers have the class Kernels, which is all that differs.
//
// Arguments come in the order of the problem types in fastattn/problem.py, then saved results, then
// outputs, which Python has allocated. What is only read comes by const reference, what is written
// by value. Public validation is Python's; what is checked here is only what would make a kernel
// read out of bounds. Built on the LibTorch stable ABI: one library serves torch 2.11 and later on
// every Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <string>
#include <type_traits>

#include "params.h"

#ifdef FASTATTN_CUDA
#include "bindings_cuda.h"
#else
#include "bindings_cpu.h"
#endif

namespace fastattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      STD_TORCH_CHECK(false, "fastattn kernels take float32, bfloat16 and float16");
  }
}

template <class T>
const T* data(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Strides of (B, S, H, D), or of packed (T, H, D) with batch 0.
Strides strides_of(const Tensor& t) {
  const int64_t n = t.dim();
  STD_TORCH_CHECK(n == 3 || n == 4, "expected 3 or 4 dimensions, got ", n);
  STD_TORCH_CHECK(t.size(n - 1) <= 1 || t.stride(n - 1) == 1,
                  "the last dimension must have stride 1");
  return {n == 4 ? t.stride(0) : 0, t.stride(n - 3), t.stride(n - 2)};
}

// Strides of a tensor broadcast to (B, H, S_q, S_k): 0 wherever its size is 1.
ScoreStrides score_strides_of(const Tensor& t) {
  const auto stride = [&](int i) { return t.size(i) == 1 ? 0 : t.stride(i); };
  return {stride(0), stride(1), stride(2), stride(3)};
}

AttnFwdParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& mask, const OptionalTensor& bias,
                               const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                               const OptionalTensor& seed, const OptionalTensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q,
                               int64_t max_seqlen_k, int64_t window_left, int64_t window_right,
                               double scale, double softcap, double dropout_p,
                               const OptionalTensor& out, const Tensor& lse) {
  AttnFwdParams p{};
  const bool packed = cu_seqlens_q.has_value();
  const int64_t n = q.dim();
  p.dtype = dtype_of(q);
  p.batch = packed ? cu_seqlens_q->size(0) - 1 : q.size(0);
  p.heads_q = q.size(n - 2);
  p.heads_k = k.size(n - 2);
  p.seqlen_q = packed ? max_seqlen_q : q.size(1);
  p.seqlen_k = packed ? max_seqlen_k : k.size(1);
  p.head_dim = q.size(n - 1);
  p.head_dim_v = v.size(n - 1);
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_stride = strides_of(q);
  p.k_stride = strides_of(k);
  p.v_stride = strides_of(v);
  if (out) {
    p.out = out->data_ptr();
    p.out_stride = strides_of(*out);
  }
  p.lse = static_cast<float*>(lse.data_ptr());
  p.lse_stride_batch = packed ? 0 : lse.stride(0);
  p.lse_stride_head = lse.stride(packed ? 0 : 1);
  p.cu_seqlens_q = data<int32_t>(cu_seqlens_q);
  p.cu_seqlens_k = data<int32_t>(cu_seqlens_k);
  p.tokens_q = q.size(n - 3);
  p.tokens_k = k.size(n - 3);
  p.scale = float(scale);
  p.softcap = float(softcap);
  p.window_left = window_left;
  p.window_right = window_right;
  if (mask) {
    p.mask = data<uint8_t>(mask);
    p.mask_stride = score_strides_of(*mask);
  }
  if (bias) {
    p.bias = bias->const_data_ptr();
    p.bias_dtype = dtype_of(*bias);
    p.bias_stride = score_strides_of(*bias);
  }
  if (alibi_slopes) {
    p.alibi_slopes = data<float>(alibi_slopes);
    p.alibi_stride_batch = alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
  }
  p.sinks = data<float>(sinks);
  if (seed && dropout_p > 0) {
    p.seed = data<int64_t>(seed);
    p.dropout_threshold = uint64_t(std::llround(dropout_p * 4294967296.0));
    p.dropout_scale = dropout_p < 1 ? float(1 / (1 - dropout_p)) : 0.0f;
  }
  return p;
}

#define FASTATTN_ATTENTION_ARGS                                                                    \
  const Tensor &q, const Tensor &k, const Tensor &v, const OptionalTensor &mask,                   \
      const OptionalTensor &bias, const OptionalTensor &alibi_slopes, const OptionalTensor &sinks, \
      const OptionalTensor &seed, const OptionalTensor &cu_seqlens_q,                              \
      const OptionalTensor &cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,              \
      int64_t window_left, int64_t window_right, double scale, double softcap, double dropout_p
#define FASTATTN_ATTENTION_PARAMS                                                              \
  attention_params(q, k, v, mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, \
                   max_seqlen_q, max_seqlen_k, window_left, window_right, scale, softcap,      \
                   dropout_p, out, lse)

void attn_fwd(Kernels& kernels, FASTATTN_ATTENTION_ARGS, Tensor out, Tensor lse) {
  kernels.attn_fwd(FASTATTN_ATTENTION_PARAMS);
}

void attn_entropy(Kernels& kernels, FASTATTN_ATTENTION_ARGS, const Tensor& lse, Tensor entropy) {
  const OptionalTensor out;
  kernels.attn_entropy({FASTATTN_ATTENTION_PARAMS, static_cast<float*>(entropy.data_ptr())});
}

void attn_bwd(Kernels& kernels, FASTATTN_ATTENTION_ARGS, const Tensor& out, const Tensor& lse,
              const Tensor& dout, const OptionalTensor& dlse, Tensor dq, Tensor dk, Tensor dv,
              OptionalTensor dbias, OptionalTensor dsinks, bool deterministic) {
  AttnBwdParams p{};
  p.fwd = FASTATTN_ATTENTION_PARAMS;
  p.dout = dout.const_data_ptr();
  p.dout_stride = strides_of(dout);
  if (dlse) {
    const bool packed = dlse->dim() == 2;
    p.dlse = data<float>(dlse);
    p.dlse_stride_batch = packed ? 0 : dlse->stride(0);
    p.dlse_stride_head = dlse->stride(packed ? 0 : 1);
  }
  p.dq = dq.data_ptr();
  p.dk = dk.data_ptr();
  p.dv = dv.data_ptr();
  p.dq_stride = strides_of(dq);
  p.dk_stride = strides_of(dk);
  p.dv_stride = strides_of(dv);
  if (dbias) {
    p.dbias = static_cast<float*>(dbias->data_ptr());
    p.dbias_stride = score_strides_of(*dbias);
  }
  if (dsinks) p.dsinks = static_cast<float*>(dsinks->data_ptr());
  p.deterministic = deterministic;
  kernels.attn_bwd(p);
}

// q arrives rotated; new keys and values are rotated and appended by cache_append just before.
void attn_decode(Kernels& kernels, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& cache_seqlens, int64_t seqlen_new, const OptionalTensor& block_table,
                 const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
                 const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                 int64_t window_left, int64_t window_right, double scale, double softcap,
                 int64_t num_splits, Tensor out, Tensor lse) {
  AttnDecodeParams p{};
  p.dtype = dtype_of(q);
  p.batch = q.size(0);
  p.seqlen_q = q.size(1);
  p.heads_q = q.size(2);
  p.heads_k = k_cache.size(2);
  p.head_dim = q.size(3);
  p.head_dim_v = v_cache.size(3);
  p.q = q.const_data_ptr();
  p.q_stride = strides_of(q);
  p.k_cache = k_cache.const_data_ptr();
  p.v_cache = v_cache.const_data_ptr();
  p.k_stride = strides_of(k_cache);
  p.v_stride = strides_of(v_cache);
  p.out = out.data_ptr();
  p.out_stride = strides_of(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.lse_stride_batch = lse.stride(0);
  p.lse_stride_head = lse.stride(1);
  p.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr());
  p.seqlen_new = seqlen_new;
  p.cache_leftpad = data<int32_t>(cache_leftpad);
  p.cache_batch_idx = data<int32_t>(cache_batch_idx);
  if (block_table) {
    p.block_table = data<int32_t>(block_table);
    p.block_table_stride = block_table->stride(0);
    p.page_size = k_cache.size(1);
  }
  p.scale = float(scale);
  p.softcap = float(softcap);
  p.window_left = window_left;
  p.window_right = window_right;
  if (alibi_slopes) {
    p.alibi_slopes = data<float>(alibi_slopes);
    p.alibi_stride_batch = alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
  }
  p.sinks = data<float>(sinks);
  p.num_splits = num_splits;
  kernels.attn_decode(p);
}

void cache_append(Kernels& kernels, const Tensor& k_new, const Tensor& v_new, Tensor k_cache,
                  Tensor v_cache, const Tensor& cache_seqlens, const OptionalTensor& block_table,
                  const OptionalTensor& cache_batch_idx, const OptionalTensor& rotary_cos,
                  const OptionalTensor& rotary_sin, bool rotary_interleaved) {
  CacheAppendParams p{};
  p.dtype = dtype_of(k_new);
  p.batch = k_new.size(0);
  p.seqlen_new = k_new.size(1);
  p.heads_k = k_new.size(2);
  p.head_dim = k_new.size(3);
  p.head_dim_v = v_new.size(3);
  p.k_new = k_new.const_data_ptr();
  p.v_new = v_new.const_data_ptr();
  p.k_new_stride = strides_of(k_new);
  p.v_new_stride = strides_of(v_new);
  p.k_cache = k_cache.data_ptr();
  p.v_cache = v_cache.data_ptr();
  p.k_stride = strides_of(k_cache);
  p.v_stride = strides_of(v_cache);
  p.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.const_data_ptr());
  p.cache_batch_idx = data<int32_t>(cache_batch_idx);
  if (block_table) {
    p.block_table = data<int32_t>(block_table);
    p.block_table_stride = block_table->stride(0);
    p.page_size = k_cache.size(1);
  }
  if (rotary_cos && rotary_sin) {
    p.rotary_cos = rotary_cos->const_data_ptr();
    p.rotary_sin = rotary_sin->const_data_ptr();
    p.rotary_dtype = dtype_of(*rotary_cos);
    p.rotary_dim = 2 * rotary_cos->size(1);
    p.rotary_stride = rotary_cos->stride(0);
    p.rotary_interleaved = rotary_interleaved;
  }
  kernels.cache_append(p);
}

CrossEntropyParams cross_entropy_params(const Tensor& logits, const Tensor& target,
                                        const OptionalTensor& weight, int64_t ignore_index,
                                        double label_smoothing, double z_loss, double softcap) {
  STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, "logits must have last stride 1");
  CrossEntropyParams p{};
  p.dtype = dtype_of(logits);
  p.rows = logits.size(0);
  p.vocab = logits.size(1);
  p.logits = logits.const_data_ptr();
  p.logits_stride = logits.stride(0);
  p.target = static_cast<const int64_t*>(target.const_data_ptr());
  p.weight = data<float>(weight);
  p.ignore_index = ignore_index;
  p.label_smoothing = float(label_smoothing);
  p.z_loss = float(z_loss);
  p.softcap = float(softcap);
  return p;
}

void set_gradient(CrossEntropyParams& p, const OptionalTensor& dloss,
                  const OptionalTensor& dlogits) {
  if (!dlogits) return;
  STD_TORCH_CHECK(dloss.has_value(), "a gradient needs dloss");
  p.dlogits = dlogits->data_ptr();
  p.dlogits_dtype = dtype_of(*dlogits);
#ifdef FASTATTN_CUDA
  const bool rounds = p.dlogits != p.logits;
#else
  const bool rounds = p.dlogits_dtype == DType::kBF16;
#endif
  STD_TORCH_CHECK(p.dlogits_dtype == p.dtype || (p.dtype == DType::kF32 && rounds),
                  "dlogits must be of the logits' dtype");
  p.dlogits_stride = dlogits->stride(0);
  p.dloss = data<float>(dloss);
  p.dloss_stride = dloss->dim() == 0 ? 0 : dloss->stride(0);
}

void cross_entropy_fwd(Kernels& kernels, const Tensor& logits, const Tensor& target,
                       const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                       double z_loss, double softcap, const OptionalTensor& dloss, Tensor loss,
                       Tensor lse, OptionalTensor dlogits) {
  auto p =
      cross_entropy_params(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap);
  p.loss = static_cast<float*>(loss.data_ptr());
  p.lse = static_cast<float*>(lse.data_ptr());
  set_gradient(p, dloss, dlogits);
  kernels.cross_entropy_fwd(p);
}

void cross_entropy_bwd(Kernels& kernels, const Tensor& logits, const Tensor& target,
                       const OptionalTensor& weight, int64_t ignore_index, double label_smoothing,
                       double z_loss, double softcap, const Tensor& lse, const Tensor& dloss,
                       const OptionalTensor& dlse, Tensor dlogits) {
  auto p =
      cross_entropy_params(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap);
  p.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  set_gradient(p, dloss, dlogits);
  p.dlse = data<float>(dlse);
  kernels.cross_entropy_bwd(p);
}

#ifndef FASTATTN_CUDA
void matmul(Kernels& kernels, const Tensor& a, const Tensor& b, Tensor out, bool accumulate) {
  MatmulParams p{};
  p.a_dtype = dtype_of(a);
  p.b_dtype = dtype_of(b);
  p.rows = out.size(0);
  p.cols = out.size(1);
  p.depth = a.size(1);
  STD_TORCH_CHECK(a.size(0) == p.rows && b.size(0) == p.depth && b.size(1) == p.cols,
                  "shapes don't fit");
  const auto strides = [](const Tensor& t, int64_t& row, int64_t& col) {
    row = t.size(0) <= 1 && t.stride(1) != 1 ? 1 : t.stride(0);
    col = t.size(1) <= 1 && row != 1 ? 1 : t.stride(1);
    STD_TORCH_CHECK(row == 1 || col == 1, "a dimension of each matrix must be contiguous");
  };
  strides(a, p.a_row, p.a_col);
  strides(b, p.b_row, p.b_col);
  STD_TORCH_CHECK(dtype_of(out) == DType::kF32 && (p.cols <= 1 || out.stride(1) == 1),
                  "out must be fp32 rows");
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.c = static_cast<float*>(out.data_ptr());
  p.c_row = out.stride(0);
  p.accumulate = accumulate;
  kernels.matmul(p);
}
#endif

std::string target() { return Kernels::target(); }

// Of the operators below: whoever changes them counts on, here and in fastattn/library.py, which
// refuses a library of another count.
int64_t interface() { return 3; }

// An operator as torch calls it: kernels for these arguments, then `op`.
template <auto op>
struct Entry;
template <class... Arguments, void (*op)(Kernels&, Arguments...)>
struct Entry<op> {
  static void call(std::decay_t<Arguments>... arguments) {
    Kernels kernels(static_cast<Arguments&&>(arguments)...);
    op(kernels, static_cast<Arguments&&>(arguments)...);
  }
};

}  // namespace
}  // namespace fastattn

#define FASTATTN_ATTENTION_SCHEMA                                                                  \
  "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? "       \
  "sinks, "                                                                                        \
  "Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, " \
  "int window_left, int window_right, float scale, float softcap, float dropout_p, "
#define FASTATTN_CROSS_ENTROPY_SCHEMA                                                       \
  "Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, " \
  "float z_loss, float softcap, "

STABLE_TORCH_LIBRARY_FRAGMENT(FASTATTN_OPS, m) {
  m.def("attn_fwd(" FASTATTN_ATTENTION_SCHEMA "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attn_entropy(" FASTATTN_ATTENTION_SCHEMA "Tensor lse, Tensor(a!) entropy) -> ()");
  m.def("attn_bwd(" FASTATTN_ATTENTION_SCHEMA
        "Tensor out, Tensor lse, Tensor dout, Tensor? dlse, Tensor(a!) dq, Tensor(b!) dk, "
        "Tensor(c!) dv, Tensor(d!)? dbias, Tensor(e!)? dsinks, bool deterministic) -> ()");
  m.def(
      "attn_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, "
      "int seqlen_new, Tensor? block_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, "
      "Tensor? alibi_slopes, Tensor? sinks, int window_left, int window_right, float scale, "
      "float softcap, int num_splits, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "cache_append(Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor cache_seqlens, Tensor? block_table, Tensor? cache_batch_idx, Tensor? rotary_cos, "
      "Tensor? rotary_sin, bool rotary_interleaved) -> ()");
  m.def("cross_entropy_fwd(" FASTATTN_CROSS_ENTROPY_SCHEMA
        "Tensor? dloss, Tensor(a!) loss, Tensor(b!) lse, Tensor(c!)? dlogits) -> ()");
  m.def("cross_entropy_bwd(" FASTATTN_CROSS_ENTROPY_SCHEMA
        "Tensor lse, Tensor dloss, Tensor? dlse, Tensor(a!) dlogits) -> ()");
#ifndef FASTATTN_CUDA
  m.def("matmul(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()");
#endif
  m.def(FASTATTN_TARGET "() -> str");
  m.def("interface() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(FASTATTN_OPS, FASTATTN_KEY, m) {
  m.impl("attn_fwd", TORCH_BOX(&fastattn::Entry<&fastattn::attn_fwd>::call));
  m.impl("attn_entropy", TORCH_BOX(&fastattn::Entry<&fastattn::attn_entropy>::call));
  m.impl("attn_bwd", TORCH_BOX(&fastattn::Entry<&fastattn::attn_bwd>::call));
  m.impl("attn_decode", TORCH_BOX(&fastattn::Entry<&fastattn::attn_decode>::call));
  m.impl("cache_append", TORCH_BOX(&fastattn::Entry<&fastattn::cache_append>::call));
  m.impl("cross_entropy_fwd", TORCH_BOX(&fastattn::Entry<&fastattn::cross_entropy_fwd>::call));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fastattn::Entry<&fastattn::cross_entropy_bwd>::call));
#ifndef FASTATTN_CUDA
  m.impl("matmul", TORCH_BOX(&fastattn::Entry<&fastattn::matmul>::call));
#endif
}
STABLE_TORCH_LIBRARY_IMPL(FASTATTN_OPS, CompositeExplicitAutograd, m) {
  m.impl(FASTATTN_TARGET, TORCH_BOX(&fastattn::target));
  m.impl("interface", TORCH_BOX(&fastattn::interface));
}
