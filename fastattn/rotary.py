"""Rotary position embedding (Su et al., RoFormer, 2021) of (B, S, H, D) tensors, plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import DecodeProblem


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first `2 · cos.shape[-1]` dims of `x` in pairs; the rest passes through.

    x: (B, S, H, D); cos, sin: (S, R) or (B, S, R) with R ≤ D / 2. Pairs are (i, i + R), or
    (2i, 2i + 1) if `interleaved`. Computed in fp32 at least, returned in x's dtype.
    """
    rotary_dim = 2 * cos.shape[-1]
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(compute).unsqueeze(-2), sin.to(compute).unsqueeze(-2)  # (…, S, 1, R)
    turned, rest = x[..., :rotary_dim].to(compute), x[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((out.to(x.dtype), rest), dim=-1)


def rotate_queries(p: DecodeProblem) -> Tensor:
    """The decode problem's queries after rotary.

    Query i of sequence b is at position cache_seqlens[b] + i, or, when neither causal nor windowed,
    all of them at cache_seqlens[b] (flash_attn's rule).
    """
    if p.rotary_cos is None or p.rotary_sin is None:
        return p.q
    offsets = torch.arange(p.q.shape[1], device=p.q.device)
    if p.window_left < 0 and p.window_right < 0:
        offsets = torch.zeros_like(offsets)
    positions = p.cache_seqlens.long()[:, None] + offsets  # (B, S_q)
    return apply_rotary(p.q, p.rotary_cos[positions], p.rotary_sin[positions], p.rotary_interleaved)
