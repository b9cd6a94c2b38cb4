"""From problems to the kernels' arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.philox import keep_threshold
from fastattn.problem import AttentionProblem, DecodeProblem

from .configs import Tile, Work, next_power_of_2
from .primitives import Heads, Lengths, ScoreMods, Scores, Window


def heads_of(x: Tensor, packed: bool) -> Heads:
    """x (B, S, H, …), or packed (T, H, …)."""
    batch, seq, head = (0, *x.stride()[:2]) if packed else x.stride()[:3]
    return Heads(x, batch, seq, head)


def rows_of(x: Tensor, packed: bool) -> Heads:
    """x (B, H, S), or packed (H, T): one number a query, such as lse."""
    batch, head, seq = (0, *x.stride()) if packed else x.stride()
    return Heads(x, batch, seq, head)


def scores_of(x: Tensor | None) -> Scores | None:
    """x (B, H_q, S_q, S_k), axes of size 1 broadcast."""
    if x is None:
        return None
    strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Scores(x, *strides)


def window_of(p: AttentionProblem | DecodeProblem) -> Window:
    left, right = p.window_left, p.window_right
    return Window(left if left >= 0 else None, right if right >= 0 else None)


def padded(head_dim: int) -> int:
    """The size of tiles of such rows: a power of 2, of at least what products take."""
    return max(16, next_power_of_2(head_dim))


def batch_of(p: AttentionProblem) -> int:
    return p.q.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1


def lengths_of(p: AttentionProblem) -> Lengths:
    if p.packed:
        return Lengths(p.max_seqlen_q, p.max_seqlen_k, p.cu_seqlens_q, p.cu_seqlens_k)
    return Lengths(p.q.shape[1], p.k.shape[1], None, None)


def mods_of(p: AttentionProblem | DecodeProblem) -> ScoreMods:
    options = p._asdict()
    mask, bias, slopes = (options.get(name) for name in ("mask", "bias", "alibi_slopes"))
    plain = p.scale > 0 and p.softcap == 0 and mask is None and bias is None and slopes is None
    dropout_p = options.get("dropout_p", 0.0)
    return ScoreMods(
        unit=p.scale if plain else 1.0,
        scale=None if plain else p.scale / p.softcap if p.softcap else p.scale,
        softcap=p.softcap or None,
        mask=scores_of(mask),
        bias=scores_of(bias),
        alibi_slopes=slopes,
        alibi_stride=None if slopes is None else slopes.stride(0) if slopes.dim() == 2 else 0,
        seed=options.get("seed"),
        threshold=keep_threshold(dropout_p) if dropout_p else None,
        keep_scale=None if not dropout_p else 1 / (1 - dropout_p) if dropout_p < 1 else 0.0,
    )


def work_of(q: Tensor, head_dim_v: int, mods: ScoreMods) -> Work:
    head_dims = (q.shape[-1], head_dim_v)
    options = mods.scale is not None or mods.seed is not None
    heavy = options or any(head_dim != padded(head_dim) for head_dim in head_dims)
    return Work(q.dtype, padded(max(head_dims)), heavy)


def constants_of(q: Tensor, v: Tensor, tile: Tile) -> dict[str, Any]:
    """Those that every attention kernel has."""
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    return {
        "GROUP_SIZE": q.shape[-2] // v.shape[-2],
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(head_dim_v),
        "PRECISION": precision_of(q.dtype),
    }


def precision_of(dtype: torch.dtype) -> str:
    """Of products of fp32, as torch's own: torch.set_float32_matmul_precision."""
    asked = torch.get_float32_matmul_precision() if dtype == torch.float32 else "highest"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[asked]
