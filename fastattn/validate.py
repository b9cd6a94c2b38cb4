"""Checks of arguments: TypeError or ValueError with the argument, what came and what is allowed.

Public functions check types, dtypes, shapes and devices, which cost nothing. What lies in tensors
and would send a kernel out of bounds (offsets, cache positions, targets) is checked by the
operators, on the real tensors: a compiled graph is held to it too, and only on the CPU, where
reading them needs no device sync.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from .problem import AttentionProblem, DecodeProblem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
LARGEST = sys.float_info.max


# ---- tensors ----


def tensor(name: str, t: object, ndim: int | None = None) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if ndim is not None and t.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(t.shape)}")
    return t


def same_dtype_and_device(**tensors: Tensor | None) -> None:
    """All given tensors share the first one's dtype, one of DTYPES, and its device."""
    given = {name: t for name, t in tensors.items() if t is not None}
    (first_name, first), *others = given.items()
    if first.dtype not in DTYPES:
        raise TypeError(
            f"{first_name} must be float16, bfloat16, float32 or float64, got {first.dtype}"
        )
    for name, t in others:
        if tensor(name, t).dtype != first.dtype:
            raise TypeError(
                f"{name} has dtype {t.dtype} but {first_name} has {first.dtype};"
                " they must be the same"
            )
        same_device(name, t, first_name, first.device)


def same_device(name: str, t: Tensor, first_name: str, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(
            f"{name} is on {t.device} but {first_name} is on {device}; they must be the same"
        )


def accumulator_dtype(t: Tensor) -> torch.dtype:
    """What scores, lse and per-head or per-class options are held in."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ---- attention ----


def attention_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """(B, S, H, D), or packed (T, H, D): batches, key lengths, heads and head dims agree."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    problem = None
    if q.dim() == 4 and not q.shape[0] == k.shape[0] == v.shape[0]:
        problem = "batch sizes differ"
    elif k.shape[-3] != v.shape[-3]:
        problem = "k and v have different lengths"
    elif k.shape[-2] != v.shape[-2]:
        problem = "k and v have different head counts"
    elif (reason := ungroupable(q.shape[-2], k.shape[-2])) is not None:
        problem = f"{reason} of k"
    if problem is not None:
        layout = (
            "(batch, sequence, heads, head_dim)" if q.dim() == 4 else "(tokens, heads, head_dim)"
        )
        raise ValueError(f"{problem}: {shapes}, expected {layout}{_transposed_hint(q, k, v)}")
    head_dims(q=q, k=k, v=v)


def ungroupable(heads_q: int, heads_k: int) -> str | None:
    if heads_q == 0 or heads_k == 0 or heads_q % heads_k:
        return f"the {heads_q} heads of q can't be grouped over the {heads_k} heads"
    return None


def head_dims(**qkv: Tensor) -> None:
    """The first two, q and k, have one head dim; theirs and the third's are ones kernels have."""
    (q_name, q), (k_name, k), (v_name, v) = qkv.items()
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{q_name} and {k_name} have different head dims, {q.shape[-1]} and {k.shape[-1]}"
        )
    for name, t in ((q_name, q), (v_name, v)):
        if not 1 <= t.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head dim {t.shape[-1]}; allowed are 1 to {MAX_HEAD_DIM}")


def _transposed_hint(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Would the shapes be right as (B, H, S, D)?"""
    if q.dim() != 4 or k.shape[1:3] != v.shape[1:3]:
        return ""
    if (
        ungroupable(q.shape[1], k.shape[1]) is None
        and ungroupable(q.shape[2], k.shape[2]) is not None
    ):
        return (
            ". They would fit as (batch, heads, sequence, head_dim): transpose(1, 2) them, or call"
            " fastattn.scaled_dot_product_attention, which takes that layout"
        )
    return ""


def window(causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    """(left, right) with causal folded in."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise ValueError(f"window must be a pair (left, right), got {window!r}") from None
    for side, n in (("left", left), ("right", right)):
        if not isinstance(n, (int, torch.SymInt)):
            raise TypeError(f"window {side} must be an int, got {n!r}")
        if n < -1:
            raise ValueError(f"window {side} must be ≥ -1 (-1 is unlimited), got {n!r}")
    return left, 0 if causal else right


def number(name: str, x: float, low: float = -LARGEST, high: float = LARGEST) -> float:
    """x as a finite float in [low, high]."""
    try:
        x = float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {x!r}") from None
    if not (low <= x <= high):  # no isinf: Dynamo traces floats by comparisons alone
        limits = [f"≥ {low:g}"] * (low > -LARGEST) + [f"≤ {high:g}"] * (high < LARGEST)
        raise ValueError(f"{name} must be {' and '.join(['finite', *limits])}, got {x!r}")
    return x


def score_shaped(
    name: str, t: Tensor, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """`t` with leading dimensions added up to 4, if it broadcasts to (B, H_q, S_q, S_k)."""
    full = (batch, heads, seqlen_q, seqlen_k)
    sizes = zip(t.shape[::-1], full[::-1], strict=False)
    if t.dim() > 4 or any(have not in (1, want) for have, want in sizes):
        raise ValueError(
            f"{name} of shape {tuple(t.shape)} does not broadcast to (B, H_q, S_q, S_k) = {full}"
        )
    return t.reshape((1,) * (4 - t.dim()) + tuple(t.shape))


def per_head(name: str, t: Tensor, q: Tensor, batch: int | None) -> Tensor:
    """(H_q,), or (B, H_q) where `batch` is given: contiguous, fp32 (fp64 for fp64 q)."""
    tensor(name, t)
    heads = q.shape[-2]
    allowed = [(heads,)] + ([(batch, heads)] if batch is not None else [])
    if tuple(t.shape) not in allowed:
        raise ValueError(
            f"{name} must have shape {' or '.join(map(str, allowed))}, got {tuple(t.shape)}"
        )
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")
    same_device(name, t, "q", q.device)
    return t.to(accumulator_dtype(q)).contiguous()


def index_tensor(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Contiguous int32 of this shape (-1 = any size)."""
    tensor(name, t, len(shape))
    if t.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {t.dtype}")
    if any(want not in (-1, have) for have, want in zip(t.shape, shape, strict=True)):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    same_device(name, t, "q", device)
    return t.contiguous()


# ---- values, on the host only ----


def _readable(t: Tensor) -> bool:
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
    )


def packed_offsets(p: AttentionProblem) -> None:
    """cu_seqlens rise from 0 to the number of tokens, in steps no longer than max_seqlen."""
    for side, offsets, t, longest in (
        ("q", p.cu_seqlens_q, p.q, p.max_seqlen_q),
        ("k", p.cu_seqlens_k, p.k, p.max_seqlen_k),
    ):
        if offsets is None or not _readable(offsets):
            continue
        values, tokens = offsets.tolist(), t.shape[0]
        lengths = [end - start for start, end in itertools.pairwise(values)]
        if values[0] != 0 or values[-1] != tokens or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens_{side} must rise from 0 to the {tokens} tokens of {side}, got {values}"
            )
        if max(lengths, default=0) > longest:
            raise ValueError(
                f"max_seqlen_{side} is {longest} but the longest sequence has {max(lengths)} tokens"
            )


def cache_indices(p: DecodeProblem) -> None:
    """All cache rows, pages and positions, and rotary positions, are ones that exist."""
    if not _readable(p.cache_seqlens) or not p.cache_seqlens.numel():
        return
    rows, page_size = p.k_cache.shape[:2]
    capacity = page_size if p.block_table is None else p.block_table.shape[1] * page_size
    seqlen_new = 0 if p.k is None else p.k.shape[1]
    lengths = p.cache_seqlens.tolist()
    if min(lengths) < 0 or max(lengths) + seqlen_new > capacity:
        raise ValueError(
            f"cache_seqlens {lengths} plus {seqlen_new} new keys must lie in [0, {capacity}],"
            " the cache's capacity"
        )
    if p.rotary_cos is not None:
        windowed = p.window_left >= 0 or p.window_right >= 0
        queries = p.q.shape[1] if windowed else 1  # not windowed: all at the first one's position
        needed = max(lengths) + max(seqlen_new, queries)
        if needed > p.rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos has {p.rotary_cos.shape[0]} positions, but {needed} are needed"
            )
    if p.cache_batch_idx is not None:
        used = p.cache_batch_idx.tolist()
        if min(used) < 0 or max(used) >= rows:
            raise ValueError(f"cache_batch_idx must lie in [0, {rows}), got {used}")
    if p.cache_leftpad is not None:
        starts = p.cache_leftpad.tolist()
        if any(not 0 <= start <= n + seqlen_new for start, n in zip(starts, lengths, strict=True)):
            raise ValueError(
                f"cache_leftpad must lie between 0 and cache_seqlens {lengths} plus {seqlen_new}"
                f" new keys, got {starts}"
            )
    if p.block_table is not None and capacity:
        pages = (p.cache_seqlens + (seqlen_new + page_size - 1)) // page_size  # (B,)
        needed = torch.arange(p.block_table.shape[1]) < pages[:, None]
        bad = needed & ((p.block_table < 0) | (p.block_table >= rows))
        if bool(bad.any()):
            b, i = bad.nonzero()[0].tolist()
            raise ValueError(
                f"block_table must name pages in [0, {rows}), got {int(p.block_table[b, i])}"
                f" at [{b}, {i}]"
            )


def targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Each is `ignore_index` or a class; IndexError otherwise, as torch's cross-entropy."""
    if not _readable(target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= vocab))
    if bool(bad.any()):
        raise IndexError(f"target {int(target[bad][0])} is out of range for {vocab} classes")
