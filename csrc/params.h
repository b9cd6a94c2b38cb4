// What a kernel is told: plain structs of pointers, element strides and sizes. No torch, no CUDA
// types.
//
// Letters as in docs/design.md: B batch, S sequence, H heads, D head dim, T packed tokens. Strides
// count elements, not bytes; the last dimension of every (B, S, H, D) tensor has stride 1. All
// offsets are 64-bit.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { kF32, kBF16, kF16 };

// Strides of a (B, S, H, D) tensor. A packed (T, H, D) tensor has batch = 0 and is entered at
// cu_seqlens[b].
struct Strides {
  int64_t batch, seq, head;
};

// Strides of something shaped like the scores, (B, H, S_q, S_k); 0 along a broadcast dimension.
struct ScoreStrides {
  int64_t batch, head, row, col;
};

// What makes scores of products q·k, and drops weights. Everything optional is null (or 0) when
// absent.
struct ScoreParams {
  float scale;    // multiplies QKᵀ
  float softcap;  // 0 = none

  const uint8_t* mask;  // nonzero = attend
  ScoreStrides mask_stride;
  const void* bias;  // of bias_dtype: the problem's dtype or fp32
  DType bias_dtype;
  ScoreStrides bias_stride;
  const float* alibi_slopes;  // slope = alibi_slopes[b·alibi_stride_batch + h]
  int64_t alibi_stride_batch;

  // Dropout: Philox word (counter = (j / 4, i, h, b), lane j % 4, key = *seed) keeps key j iff word
  // ≥ threshold.
  const int64_t* seed;         // null = no dropout
  uint64_t dropout_threshold;  // round(p · 2³²)
  float dropout_scale;         // 1 / (1 - p), 0 for p = 1
};

// softmax(scale·QKᵀ …)V.
struct AttnFwdParams : ScoreParams {
  DType dtype;  // of q, k, v, out
  int64_t batch, heads_q, heads_k;
  int64_t seqlen_q, seqlen_k;    // of every sequence, or the longest when packed
  int64_t head_dim, head_dim_v;  // 1 … 256

  const void *q, *k, *v;
  Strides q_stride, k_stride, v_stride;
  void* out;
  Strides out_stride;
  float* lse;  // natural log; lse[b·batch + h·head + i]
  int64_t lse_stride_batch, lse_stride_head;

  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (B + 1), both or neither
  int64_t tokens_q, tokens_k;                  // rows of the tensors: S, or T of packed ones

  int64_t window_left, window_right;  // -1 = unlimited; causal is (-1, 0)
  const float* sinks;                 // (H_q)
};

// −Σ w · log w of each query's weights w, before dropout.
struct AttnEntropyParams {
  AttnFwdParams fwd;  // its lse is an input here; v and out are not looked at
  float* entropy;     // laid out as lse
};

struct AttnBwdParams {
  AttnFwdParams fwd;  // its out and lse are inputs here
  const void* dout;
  Strides dout_stride;
  const float* dlse;  // null = zero; strides of its own
  int64_t dlse_stride_batch, dlse_stride_head;
  void *dq, *dk, *dv;  // of the problem's dtype; written whole
  Strides dq_stride, dk_stride, dv_stride;
  float* dbias;  // null or zero-filled by the caller; reduced over broadcast dimensions
  ScoreStrides dbias_stride;
  float* dsinks;       // null or zero-filled (H_q)
  bool deterministic;  // dq, dk and dv the same bit for bit each time
};

// Queries against the KV cache after the append. A page is page_size consecutive positions; not
// paged: page_size = 0. Mask, bias and dropout are for csrc/cuda alone.
struct AttnDecodeParams : ScoreParams {
  DType dtype;
  int64_t batch, heads_q, heads_k, seqlen_q, head_dim, head_dim_v;
  const void* q;
  Strides q_stride;
  const void *k_cache, *v_cache;  // (B_cache, S_cache, H_k, D), or (pages, page_size, H_k, D):
                                  // `batch` is the page stride
  Strides k_stride, v_stride;
  void* out;
  Strides out_stride;
  float* lse;
  int64_t lse_stride_batch, lse_stride_head;

  // (B): valid keys are [leftpad, cache_seqlens + seqlen_new); the CUDA kernels take null for zeros
  const int32_t* cache_seqlens;
  int64_t seqlen_new;              // keys appended to every sequence just before
  const int32_t* cache_leftpad;    // (B) or null
  const int32_t* cache_batch_idx;  // (B) or null
  const int32_t* block_table;      // (B, pages per sequence) or null
  int64_t block_table_stride, page_size;
  // Packed sequences instead of a cache, by csrc/cuda alone: (B + 1), both or neither; `seqlen_q`
  // is of the longest.
  const int32_t *cu_seqlens_q, *cu_seqlens_k;

  int64_t window_left, window_right;
  const float* sinks;
  int64_t num_splits;  // 0 = choose
};

// Rotates new keys into the cache, copies new values into the cache.
struct CacheAppendParams {
  DType dtype;
  int64_t batch, seqlen_new, heads_k, head_dim, head_dim_v;
  const void *k_new, *v_new;
  Strides k_new_stride, v_new_stride;
  void *k_cache, *v_cache;
  Strides k_stride, v_stride;
  const int32_t *cache_seqlens, *cache_batch_idx, *block_table;
  int64_t block_table_stride, page_size;
  // Rotary: cos/sin are (positions, rotary_dim / 2) of dtype `rotary_dtype`, row stride
  // rotary_stride; null = none.
  const void *rotary_cos, *rotary_sin;
  DType rotary_dtype;
  int64_t rotary_dim, rotary_stride;
  bool rotary_interleaved;
};

// Per-row cross-entropy of (N, V) logits; see reference.cross_entropy for the formula.
struct CrossEntropyParams {
  DType dtype;
  int64_t rows, vocab;
  const void* logits;
  int64_t logits_stride;
  const int64_t* target;
  const float* weight;  // (V) or null
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
  float* loss;  // (N); forward writes it
  float* lse;   // (N); forward writes it, backward reads it
  // Gradient: null = none wanted. May be the logits themselves. Row r's gradient is
  // dloss[r · dloss_stride] · ∂loss_r + dlse[r] · ∂lse_r.
  void* dlogits;
  DType dlogits_dtype;  // dtype; of fp32 the CPU kernels also make bf16, and CUDA's, beside the
                        // logits, bf16 and fp16
  int64_t dlogits_stride;
  const float* dloss;
  int64_t dloss_stride;  // 0 = one scalar for all rows
  const float* dlse;     // (N) or null
};

// C (rows, cols) = A (rows, depth) · B (depth, cols), or += where `accumulate`; sums in fp32.
struct MatmulParams {
  DType a_dtype, b_dtype;
  int64_t rows, cols, depth;
  const void *a, *b;
  int64_t a_row, a_col, b_row, b_col;  // strides; of each matrix one is 1
  float* c;
  int64_t c_row;
  bool accumulate;
};

}  // namespace fastattn
