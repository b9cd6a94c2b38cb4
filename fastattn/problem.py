"""The problems the backends solve: a NamedTuple an operator, its fields in the schema's order.

Public functions validate and normalise their arguments into one of these; every backend takes them
whole. `causal` is gone by then: it is the window (-1, 0). Shapes use the letters of docs/design.md:
B batch, S sequence, H heads, D head dim, T packed tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def last_stride_one(t: Tensor) -> Tensor:
    """t, or a copy where neighbours along its last dimension are not neighbours in memory."""
    if t.stride(-1) == 1 or t.shape[-1] <= 1:
        return t
    return t.clone(memory_format=torch.contiguous_format)  # contiguous() keeps an empty t's strides


def split(problem, args):
    """The problem at the head of an operator's arguments, and the arguments after it."""
    n = len(problem._fields)
    return problem(*args[:n]), args[n:]


class AttentionProblem(NamedTuple):
    """softmax(scale·QKᵀ …)V of (B, S, H, D) tensors, or packed (T, H, D) with `cu_seqlens_*`."""

    q: Tensor  # (B, S_q, H_q, D) or (T_q, H_q, D)
    k: Tensor  # (B, S_k, H_k, D) or (T_k, H_k, D)
    v: Tensor  # (B, S_k, H_k, D_v) or (T_k, H_k, D_v)
    mask: Tensor | None = None  # bool, True = attend; 4-D, broadcastable to (B, H_q, S_q, S_k)
    bias: Tensor | None = None  # float, q's dtype or fp32; 4-D, broadcastable to (B, H_q, S_q, S_k)
    alibi_slopes: Tensor | None = None  # (H_q,) or (B, H_q), fp32
    sinks: Tensor | None = None  # (H_q,), fp32
    seed: Tensor | None = None  # () int64: the Philox key; given iff dropout_p > 0
    cu_seqlens_q: Tensor | None = None  # (B + 1,) int32 offsets into T_q; both or neither
    cu_seqlens_k: Tensor | None = None  # (B + 1,) int32 offsets into T_k
    max_seqlen_q: int = 0  # longest packed sequence; 0 when not packed
    max_seqlen_k: int = 0
    window_left: int = -1  # keys visible left of the diagonal, inclusive; -1 = unlimited
    window_right: int = -1  # and right of it; causal is (-1, 0)
    scale: float = 1.0
    softcap: float = 0.0  # 0 = none
    dropout_p: float = 0.0

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(B, H_q, S_q), packed (H_q, T_q)."""
        tokens, heads = self.q.shape[-3:-1]
        return (heads, tokens) if self.packed else (self.q.shape[0], heads, tokens)

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        """(B, H_q, S_q, S_k), or of the longest sequences: what masks and biases broadcast to."""
        if self.cu_seqlens_q is not None:
            batch = self.cu_seqlens_q.shape[0] - 1
            return batch, self.q.shape[1], self.max_seqlen_q, self.max_seqlen_k
        return self.q.shape[0], self.q.shape[2], self.q.shape[1], self.k.shape[1]


class QKVGradients(NamedTuple):
    """Where a backward pass is to leave what it makes; any strides whose last is 1."""

    dq: Tensor
    dk: Tensor
    dv: Tensor


class DecodeProblem(NamedTuple):
    """A few queries against a KV cache, contiguous or paged; may rotate them and append keys."""

    q: Tensor  # (B, S_q, H_q, D), before rotary
    k_cache: Tensor  # (B_cache, S_cache, H_k, D), or (pages, page_size, H_k, D); appended in place
    v_cache: Tensor  # (B_cache, S_cache, H_k, D_v), or paged alike
    cache_seqlens: Tensor  # (B,) int32: keys in the cache before the append
    k: Tensor | None = None  # (B, S_new, H_k, D): appended at cache_seqlens; both or neither
    v: Tensor | None = None  # (B, S_new, H_k, D_v)
    rotary_cos: Tensor | None = None  # (positions, rotary_dim / 2); both or neither
    rotary_sin: Tensor | None = None
    block_table: Tensor | None = None  # (B, pages per sequence) int32
    cache_batch_idx: Tensor | None = (
        None  # (B,) int32: row of the cache each batch entry uses; not with block_table
    )
    cache_leftpad: Tensor | None = None  # (B,) int32: first valid cache position
    alibi_slopes: Tensor | None = None  # (H_q,) or (B, H_q), fp32
    sinks: Tensor | None = None  # (H_q,), fp32
    rotary_interleaved: bool = False  # pairs (2i, 2i+1) rather than (i, i + rotary_dim/2)
    window_left: int = -1
    window_right: int = -1
    scale: float = 1.0
    softcap: float = 0.0
    num_splits: int = 0  # splits of the cache per (sequence, KV head); 0 = the backend chooses


class CrossEntropyProblem(NamedTuple):
    """Per-row cross-entropy of class-index targets."""

    logits: Tensor  # (N, V)
    target: Tensor  # (N,) int64; ignore_index or in [0, V)
    weight: Tensor | None = None  # (V,) fp32
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # adds z_loss · lse² to each row; not multiplied by the class weight
    softcap: float = 0.0  # logits become softcap · tanh(logits / softcap); 0 = none


class LinearCrossEntropyProblem(NamedTuple):
    """Per-row cross-entropy of x @ linear_weightᵀ + linear_bias."""

    x: Tensor  # (N, C)
    linear_weight: Tensor  # (V, C)
    linear_bias: Tensor | None  # (V,)
    target: Tensor  # (N,) int64
    weight: Tensor | None = None  # (V,) fp32
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0

    def of_logits(self, logits: Tensor, rows: slice) -> CrossEntropyProblem:
        """The cross-entropy of these rows, whose logits are given."""
        return CrossEntropyProblem(logits, self.target[rows], *self[4:])
