"""What the compiled backends share: they allocate outputs and call a library's private operators.

csrc/bindings.cpp has those operators; the libraries of the CPU and of the CUDA kernels have the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .problem import (
    AttentionProblem,
    CrossEntropyProblem,
    DecodeProblem,
    QKVGradients,
    last_stride_one,
)
from .rotary import rotate_queries


class Compiled:
    """A backend's entry points; `ops()` is the library's namespace in torch.ops."""

    def __init__(self, ops: Callable[[], Any]):
        self._ops = ops

    def attn_fwd(self, p: AttentionProblem) -> tuple[Tensor, Tensor]:
        out = p.q.new_empty((*p.q.shape[:-1], p.v.shape[-1]))
        lse = p.q.new_empty(p.lse_shape, dtype=torch.float32)
        self._ops().attn_fwd(*p, out, lse)
        return out, lse

    def attn_entropy(self, p: AttentionProblem, lse: Tensor) -> Tensor:
        entropy = torch.empty_like(lse)  # contiguous
        self._ops().attn_entropy(*p, lse, entropy)
        return entropy

    def attn_bwd(
        self,
        p: AttentionProblem,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        deterministic: bool,
        into: QKVGradients | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Deterministic but for Hopper's kernels, which are if they are told to be."""
        dout = last_stride_one(dout)
        dq, dk, dv = into or (t.new_empty(t.shape) for t in (p.q, p.k, p.v))
        dbias = dsinks = None
        if p.bias is not None:
            dbias = p.bias.new_zeros(p.bias.shape, dtype=torch.float32)
        if p.sinks is not None:
            dsinks = p.sinks.new_zeros(p.sinks.shape)
        dlse = None if dlse is None else last_stride_one(dlse)
        self._ops().attn_bwd(*p, out, lse, dout, dlse, dq, dk, dv, dbias, dsinks, deterministic)
        if p.bias is not None and dbias is not None:
            dbias = dbias.to(p.bias.dtype)
        return dq, dk, dv, dbias, dsinks

    def attn_decode(self, p: DecodeProblem) -> tuple[Tensor, Tensor]:
        batch, seqlen_q, heads, _ = p.q.shape
        if p.k is not None:
            self._ops().cache_append(
                p.k, p.v, p.k_cache, p.v_cache, p.cache_seqlens, p.block_table, p.cache_batch_idx,
                p.rotary_cos, p.rotary_sin, p.rotary_interleaved,
            )  # fmt: skip
        q = rotate_queries(p)
        out = q.new_empty((batch, seqlen_q, heads, p.v_cache.shape[-1]))
        lse = q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)
        self._ops().attn_decode(
            q, p.k_cache, p.v_cache, p.cache_seqlens, 0 if p.k is None else p.k.shape[1],
            p.block_table, p.cache_batch_idx, p.cache_leftpad, p.alibi_slopes, p.sinks,
            p.window_left, p.window_right, p.scale, p.softcap, p.num_splits, out, lse,
        )  # fmt: skip
        return out, lse

    def cross_entropy_fwd(
        self, p: CrossEntropyProblem, dloss: Tensor | None, dlogits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss and lse a row; with dlogits (may be the logits) dloss · ∂loss too, in one pass."""
        loss = p.logits.new_empty(p.logits.shape[:1], dtype=torch.float32)
        lse = torch.empty_like(loss)
        self._ops().cross_entropy_fwd(*p, dloss, loss, lse, dlogits)
        return loss, lse

    def cross_entropy_bwd(
        self,
        p: CrossEntropyProblem,
        lse: Tensor,
        dloss: Tensor,
        dlse: Tensor | None,
        dlogits: Tensor | None = None,
    ) -> Tensor:
        """dloss · ∂loss + dlse · ∂lse; written to dlogits (may be the logits) if given."""
        if dlogits is None:
            dlogits = p.logits.new_empty(p.logits.shape)
        dlse = None if dlse is None else last_stride_one(dlse)  # lse.sum().backward(): stride 0
        self._ops().cross_entropy_bwd(*p, lse, dloss, dlse, dlogits)
        return dlogits
