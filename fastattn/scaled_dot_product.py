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
    least = 3 if enable_gqa else 2
    shapes = []
    for name, t in (("query", query), ("key", key), ("value", value)):
        if validate.tensor(name, t).dim() < least:
            raise ValueError(
                f"{name} must have at least {least} dimensions, got shape {tuple(t.shape)}"
            )
        shapes.append(t.shape[:-least])
    validate.same_dtype_and_device(query=query, key=key, value=value)
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask can't both be given")
    try:
        leading = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        hint = "" if enable_gqa else "; enable_gqa=True allows fewer heads of key and value"
        raise ValueError(
            f"leading dimensions of query {tuple(query.shape)}, key {tuple(key.shape)} and value"
            f" {tuple(value.shape)} don't broadcast{hint}"
        ) from None
    batch = leading if enable_gqa else leading[:-1]

    def bshd(t: Tensor) -> Tensor:
        heads = t.shape[-3] if enable_gqa else (leading or (1,))[-1]
        t = t.expand(*batch, heads, *t.shape[-2:])
        return t.reshape(math.prod(batch), *t.shape[-3:]).transpose(1, 2)

    q, k, v = bshd(query), bshd(key), bshd(value)
    window = (-1, -1)
    if is_causal:
        # Top-left is bottom-right once the keys nobody sees are cut off; queries past the last key
        # see them all.
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
        window = (-1, q.shape[1] - k.shape[1])
    mask = bias = None
    if attn_mask is not None:
        validate.tensor("attn_mask", attn_mask)
        if attn_mask.dim() > 3 and len(batch) > 1:
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:])
            attn_mask = attn_mask.reshape(math.prod(batch), *attn_mask.shape[-3:])
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    out = attention(q, k, v, window=window, scale=scale, mask=mask, bias=bias, dropout_p=dropout_p)
    shape = (*leading, query.shape[-3]) if enable_gqa else leading
    return out.transpose(1, 2).reshape(*shape, query.shape[-2], value.shape[-1])
