"""What torch.utils.flop_counter.FlopCounterMode counts for the package's operators.

Matrix products over the pairs of queries and keys that windows and causality leave visible: what
the kernels compute, and less than torch counts for its own attention, which it takes as full. Masks
are counted as full. Lengths that lie in tensors are read where they can be, else the longest count.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .flops import attention_flops, visible_pairs
from .problem import AttentionProblem, DecodeProblem, LinearCrossEntropyProblem, split

_OPS = torch.ops.fastattn


@register_flop_formula(_OPS.attn_fwd, get_raw=True)
def attn_fwd(*args, out_val=None) -> int:
    p, _ = split(AttentionProblem, args)
    return _attention(p, backward=False)


@register_flop_formula(_OPS.attn_entropy, get_raw=True)
def attn_entropy(*args, out_val=None) -> int:
    p, _ = split(AttentionProblem, args)
    return _attention(p, backward=False) // 2  # the scores alone; p has k as its v


@register_flop_formula([_OPS.attn_bwd, _OPS.attn_bwd_into], get_raw=True)
def attn_bwd(*args, out_val=None) -> int:
    p, _ = split(AttentionProblem, args)
    return _attention(p, backward=True)


@register_flop_formula([_OPS.attn_decode, _OPS.attn_decode_read], get_raw=True)
def attn_decode(*args, out_val=None) -> int:
    p, _ = split(DecodeProblem, args)
    batch, seqlen_q, heads, head_dim = p.q.shape
    pages = 1 if p.block_table is None else p.block_table.shape[1]
    capacity, new = pages * p.k_cache.shape[1], 0 if p.k is None else p.k.shape[1]
    lengths = [capacity] * batch
    if (known := _values(p.cache_seqlens)) is not None:
        starts = [0] * batch if p.cache_leftpad is None else p.cache_leftpad.tolist()
        lengths = [n + new - start for n, start in zip(known, starts, strict=True)]
    window = (p.window_left, p.window_right)
    pairs = sum(visible_pairs(seqlen_q, n, window) for n in lengths)
    return attention_flops(1, heads, pairs, head_dim, p.v_cache.shape[-1])


@register_flop_formula(_OPS.linear)
def linear(x_shape, weight_shape, *_, out_shape=None) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


@register_flop_formula(_OPS.linear_cross_entropy_fwd, get_raw=True)
def linear_cross_entropy_fwd(*args, out_val=None) -> int:
    return _product(args)


@register_flop_formula(_OPS.linear_cross_entropy_bwd, get_raw=True)
def linear_cross_entropy_bwd(*args, out_val=None) -> int:
    return 3 * _product(args)  # the logits again, dX and dW


@register_flop_formula(_OPS.linear_cross_entropy_fwd_bwd, get_raw=True)
def linear_cross_entropy_fwd_bwd(*args, out_val=None) -> int:
    _, (_, want_dx, want_dw, *_) = split(LinearCrossEntropyProblem, args)
    return (1 + want_dx + want_dw) * _product(args)


def _attention(p: AttentionProblem, backward: bool) -> int:
    heads, head_dim = p.q.shape[-2:]
    window, lengths = (p.window_left, p.window_right), [(p.q.shape[-3], p.k.shape[-3])]
    batch = p.q.shape[0]
    if p.cu_seqlens_q is not None and p.cu_seqlens_k is not None:
        offsets_q, offsets_k = _values(p.cu_seqlens_q), _values(p.cu_seqlens_k)
        batch, lengths = 1, [(p.max_seqlen_q, p.max_seqlen_k)] * (p.cu_seqlens_q.shape[0] - 1)
        if offsets_q is not None and offsets_k is not None:
            steps = ([b - a for a, b in itertools.pairwise(o)] for o in (offsets_q, offsets_k))
            lengths = list(zip(*steps, strict=True))
    pairs = sum(visible_pairs(*both, window) for both in lengths)
    return attention_flops(batch, heads, pairs, head_dim, p.v.shape[-1], backward=backward)


def _product(args: tuple) -> int:
    """2 · N · C · V."""
    p, _ = split(LinearCrossEntropyProblem, args)
    return 2 * p.x.shape[0] * p.linear_weight.numel()


def _values(t: Tensor) -> list[int] | None:
    """None where there are only shapes: on meta, or traced."""
    fake = t.is_meta or type(t) is not Tensor
    return None if fake else t.tolist()
