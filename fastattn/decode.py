"""`attention_decode`: few queries against a KV cache, contiguous or paged, appended to in place."""

from __future__ import annotations

import torch
from torch import Tensor

from . import validate
from .backends import requested
from .problem import DecodeProblem, last_stride_one


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
):
    """A few queries against a KV cache, which new keys and values are appended to in place.

    Inference only: no backward. Sequence b then has L_b = cache_seqlens[b] + S_new keys; causal and
    window align query S_q − 1 with key L_b − 1.

    Args:
        q: (B, S_q, H_q, D), before rotary.
        k_cache: (B_cache, S_cache, H_k, D), v_cache: (B_cache, S_cache, H_k, D_v); with
            `block_table` (pages, page_size, H_k, ·).
        cache_seqlens: (B,) int32, keys in the cache before the append.
        block_table: (B, pages per sequence) int32: position j of sequence b lives in page
            block_table[b, j // page_size].
        k, v: (B, S_new, H_k, D) and (B, S_new, H_k, D_v), written at positions cache_seqlens[b] +
            i. Both or neither.
        rotary_cos, rotary_sin: (positions, R), R ≤ D / 2, of q's dtype or fp32: rotate new keys at
            their positions and queries at cache_seqlens[b] + i (all at cache_seqlens[b] when
            neither causal nor windowed). Both or neither.
        rotary_interleaved: pairs are dims (2i, 2i + 1) rather than (i, i + R).
        cache_batch_idx: (B,) int32: which row of the cache each sequence uses; not with
            `block_table`.
        cache_leftpad: (B,) int32: keys before it are not seen.
        num_splits: parts the keys are split into for parallelism; 0 chooses.
        The rest is as in `attention`.

    Returns:
        out (B, S_q, H_q, D_v); with `return_lse` also lse (B, H_q, S_q) fp32.

    Raises:
        As `attention`; ValueError also when the append would run past the cache, RuntimeError if a
        gradient is wanted.
    """
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        validate.tensor(name, t, 4)
    validate.same_dtype_and_device(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    differentiable = (q, k_cache, v_cache, k, v, sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        raise RuntimeError(
            "attention_decode has no backward: call it under torch.no_grad(), or use attention"
        )
    batch, device = q.shape[0], q.device
    _check_cache(q, k_cache, v_cache)
    cache_seqlens = validate.index_tensor("cache_seqlens", cache_seqlens, (batch,), device)
    k, v = _new_keys(batch, k_cache, v_cache, k, v)
    rotary_cos, rotary_sin = _rotary_tables(q, rotary_cos, rotary_sin)
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx and block_table can't both be given")
        block_table = validate.index_tensor("block_table", block_table, (batch, -1), device)
    elif cache_batch_idx is not None:
        cache_batch_idx = validate.index_tensor(
            "cache_batch_idx", cache_batch_idx, (batch,), device
        )
    elif k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache has {k_cache.shape[0]} rows for a batch of {batch}; give cache_batch_idx"
        )
    if cache_leftpad is not None:
        cache_leftpad = validate.index_tensor("cache_leftpad", cache_leftpad, (batch,), device)
    left, right = validate.window(causal, window)
    if alibi_slopes is not None:
        alibi_slopes = validate.per_head("alibi_slopes", alibi_slopes, q, batch).detach()
    if sinks is not None:
        sinks = validate.per_head("sinks", sinks, q, None)
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits must be an integer ≥ 0, got {num_splits!r}")
    p = DecodeProblem(
        last_stride_one(q), k_cache, v_cache, cache_seqlens, k, v, rotary_cos, rotary_sin,
        block_table, cache_batch_idx, cache_leftpad, alibi_slopes, sinks, rotary_interleaved,
        left, right, q.shape[-1] ** -0.5 if scale is None else validate.number("scale", scale),
        validate.number("softcap", softcap, 0), num_splits,
    )  # fmt: skip
    ops = torch.ops.fastattn
    decode = ops.attn_decode_read if k is None else ops.attn_decode
    out, lse = decode(*p, requested(backend))
    return (out, lse) if return_lse else out


def _check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} differ in more"
            " than the head dim"
        )
    if (reason := validate.ungroupable(q.shape[2], k_cache.shape[2])) is not None:
        raise ValueError(f"{reason} of k_cache: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}")
    validate.head_dims(q=q, k_cache=k_cache, v_cache=v_cache)
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"{name} is written in place, so its last dimension must have stride 1,"
                f" got strides {t.stride()}"
            )


def _new_keys(
    batch: int, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if k is None and v is None:
        return None, None
    if k is None or v is None:
        raise ValueError("k and v must be given together")
    for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
        want = (batch, validate.tensor("k", k, 4).shape[1], *cache.shape[2:])
        if tuple(t.shape) != want:
            raise ValueError(f"{name} must have shape {want}, got {tuple(t.shape)}")
    return last_stride_one(k), last_stride_one(v)


def _rotary_tables(
    q: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if cos is None and sin is None:
        return None, None
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin must be given together")
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        validate.tensor(name, t, 2)
        validate.same_device(name, t, "q", q.device)
        if t.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"{name} must be {q.dtype}, as q, or float32, got {t.dtype}")
    most = q.shape[-1] // 2
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.shape[1] > most:
        raise ValueError(
            f"rotary_cos and rotary_sin must both be (positions, at most {most}) of one dtype, got"
            f" {tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}"
        )
    return cos.contiguous(), sin.contiguous()
