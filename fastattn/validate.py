"""Checks of public arguments: each raises TypeError or ValueError naming the argument, what came and what is allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


def tensor(name: str, t: object, ndim: int | tuple[int, ...] | None = None) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and t.dim() not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must have {expected} dimensions, got shape {tuple(t.shape)}")
    return t


def same_dtype_and_device(**tensors: Tensor | None) -> None:
    """All given tensors share the first one's dtype, one of DTYPES, and its device."""
    given = {name: t for name, t in tensors.items() if t is not None}
    (first_name, first), *others = given.items()
    if first.dtype not in DTYPES:
        raise TypeError(f"{first_name} must be float16, bfloat16, float32 or float64, got {first.dtype}")
    for name, t in others:
        if t.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {t.dtype} but {first_name} has {first.dtype}; they must be the same")
        same_device(name, t, first_name, first)


def same_device(name: str, t: Tensor, first_name: str, first: Tensor) -> None:
    if t.device != first.device:
        raise ValueError(f"{name} is on {t.device} but {first_name} is on {first.device}; they must be the same")


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
    elif k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        problem = f"the {q.shape[-2]} heads of q can't be grouped over {k.shape[-2]} heads of k"
    if problem is not None:
        raise ValueError(f"{problem}: {shapes}, expected {_layout(q)}{_transposed_hint(q, k, v)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k have different head dims: {shapes}, expected {_layout(q)}")
    for name, t in (("q", q), ("v", v)):
        if not 1 <= t.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head dim {t.shape[-1]}; allowed are 1 to {MAX_HEAD_DIM}")


def _layout(q: Tensor) -> str:
    return "(batch, sequence, heads, head_dim)" if q.dim() == 4 else "(tokens, heads, head_dim)"


def _transposed_hint(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Would the shapes be right as (B, H, S, D)?"""
    if q.dim() != 4 or not (k.shape[1] == v.shape[1] and k.shape[2] == v.shape[2] and k.shape[1]):
        return ""
    if q.shape[1] % k.shape[1] == 0 and q.shape[2] % max(k.shape[2], 1):
        return (
            ". They would fit as (batch, heads, sequence, head_dim): transpose(1, 2) them, or call "
            "fastattn.scaled_dot_product_attention, which takes that layout"
        )
    return ""


def window(causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    """(left, right) with causal folded in."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise ValueError(f"window must be a pair (left, right), got {window!r}") from None
    for side, n in (("left", left), ("right", right)):
        if isinstance(n, float) or n < -1:
            raise ValueError(f"window {side} must be an integer ≥ -1 (-1 is unlimited), got {n!r}")
    return left, 0 if causal else right


def number(name: str, x: float, low: float, high: float = math.inf) -> float:
    x = float(x)
    if not (low <= x <= high) or math.isinf(x):
        limits = f"in [{low:g}, {high:g}]" if high < math.inf else f"finite and ≥ {low:g}"
        raise ValueError(f"{name} must be {limits}, got {x!r}")
    return x


def score_shaped(name: str, t: Tensor, batch: int, heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """`t` with leading dimensions added up to 4, if it broadcasts to (B, H_q, S_q, S_k)."""
    full = (batch, heads, seqlen_q, seqlen_k)
    if t.dim() > 4 or any(have not in (1, want) for have, want in zip(t.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"{name} of shape {tuple(t.shape)} does not broadcast to (B, H_q, S_q, S_k) = {full}")
    return t.reshape((1,) * (4 - t.dim()) + tuple(t.shape))


def per_head(name: str, t: Tensor, heads: int, batch: int | None, device: torch.device) -> Tensor:
    """fp32 (H_q,), or (B, H_q) where `batch` is given."""
    tensor(name, t)
    allowed = [(heads,)] + ([(batch, heads)] if batch is not None else [])
    if tuple(t.shape) not in allowed:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, allowed))}, got {tuple(t.shape)}")
    if not t.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device} but q is on {device}; they must be the same")
    return t if t.dtype == torch.float64 else t.float()


def offsets(name: str, t: Tensor, tokens: int, device: torch.device) -> Tensor:
    """(B + 1,) int32 offsets. Values are checked where that needs no device sync: on the CPU."""
    tensor(name, t, 1)
    if t.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {t.dtype}")
    if t.shape[0] < 1:
        raise ValueError(f"{name} must have batch + 1 entries, got none")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device} but q is on {device}; they must be the same")
    if t.device.type == "cpu" and not torch.compiler.is_compiling():
        values = t.tolist()
        if values[0] != 0 or values[-1] != tokens or any(b < a for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"{name} must rise from 0 to the {tokens} tokens there are, got {values}")
    return t.contiguous()


def index_tensor(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Contiguous int32 of this shape (-1 = any size)."""
    tensor(name, t, len(shape))
    if t.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {t.dtype}")
    if any(want not in (-1, have) for have, want in zip(t.shape, shape, strict=True)):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device} but q is on {device}; they must be the same")
    return t.contiguous()
