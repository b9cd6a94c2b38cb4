"""torch's scaled_dot_product_attention, signature, layout and semantics, on `attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import validate
from .attention import attention, autocast


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional's function of this name, signature and semantics, on fastattn's kernels.

    Args:
        query: (…, H_q, S_q, D); key: (…, H_k, S_k, D); value: (…, H_k, S_k, D_v). Leading
            dimensions broadcast, heads among them; with `enable_gqa` H_q is a multiple of H_k.
        attn_mask: bool (True = attend) or float (added, differentiable); broadcasts to
            (…, H_q, S_q, S_k).
        is_causal: query i sees keys j ≤ i: aligned top-left, unlike `attention`. Not together with
            attn_mask.

    Returns:
        (…, H_q, S_q, D_v). A fully masked row gives 0, as torch's.

    Raises:
        As `attention`; ValueError also for `is_causal` with `attn_mask`, and for leading dimensions
        that don't broadcast.
    """
    query, key, value = autocast(query, key, value)
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask can't both be given")
    if _needs_no_broadcast(query, key, value, enable_gqa):
        leading: tuple[int, ...] = query.shape[:-2]
        if len(leading) == 1:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    else:
        leading, q, k, v = _broadcast(query, key, value, enable_gqa)
    window = (-1, -1)
    if is_causal:
        # Top-left is bottom-right once the keys nobody sees are cut off; queries past the last key
        # see them all.
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
        window = (-1, q.shape[1] - k.shape[1])
    mask = bias = None
    if attn_mask is not None:
        validate.tensor("attn_mask", attn_mask)
        batch = leading[:-1]
        if attn_mask.dim() > 3 and len(batch) > 1:
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:])
            attn_mask = attn_mask.reshape(math.prod(batch), *attn_mask.shape[-3:])
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    out = attention(q, k, v, window=window, scale=scale, mask=mask, bias=bias, dropout_p=dropout_p)
    out = out.transpose(1, 2)  # (B, H_q, S_q, D_v)
    return out if len(leading) == 2 else out.reshape(*leading, *out.shape[2:])


def _needs_no_broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """All 4-D or all 3-D, of one batch and one number of heads, but for groups."""
    if not all(isinstance(t, Tensor) for t in (query, key, value)):
        return False
    dims = query.dim()
    if dims not in (3, 4) or not dims == key.dim() == value.dim():
        return False
    shared = dims - 3 if enable_gqa else dims - 2
    if not query.shape[:shared] == key.shape[:shared] == value.shape[:shared]:
        return False
    return query.dtype == key.dtype == value.dtype


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The result's dimensions before (S_q, D_v), and q, k, v as (B, S, H, D)."""
    least = 3 if enable_gqa else 2
    shapes = []
    for name, t in (("query", query), ("key", key), ("value", value)):
        if validate.tensor(name, t).dim() < least:
            raise ValueError(
                f"{name} must have at least {least} dimensions, got shape {tuple(t.shape)}"
            )
        shapes.append(t.shape[:-least])
    if not query.dtype == key.dtype == value.dtype:
        validate.same_dtype_and_device(query=query, key=key, value=value)
    if (shared := _common(shapes)) is None:
        hint = "" if enable_gqa else "; enable_gqa=True allows fewer heads of key and value"
        raise ValueError(
            f"leading dimensions of query {tuple(query.shape)}, key {tuple(key.shape)} and value"
            f" {tuple(value.shape)} don't broadcast{hint}"
        )
    batch = shared if enable_gqa else shared[:-1]

    def bshd(t: Tensor) -> Tensor:
        heads = t.shape[-3] if enable_gqa else (shared or (1,))[-1]
        t = t.expand(*batch, heads, *t.shape[-2:])
        if len(batch) != 1:
            t = t.reshape(math.prod(batch), *t.shape[-3:])
        return t.transpose(1, 2)

    leading = (*shared, query.shape[-3]) if enable_gqa else shared
    return leading, bshd(query), bshd(key), bshd(value)


def _common(shapes: list[torch.Size]) -> tuple[int, ...] | None:
    """What they broadcast to, or None; a tenth of the time of torch.broadcast_shapes."""
    common = []
    for i in range(max(map(len, shapes)), 0, -1):
        size = 1
        for shape in shapes:
            if len(shape) >= i and shape[-i] != 1:
                if size not in (1, shape[-i]):
                    return None
                size = shape[-i]
        common.append(size)
    return tuple(common)
