"""The flash_attn package's functions on fastattn's kernels: its signatures, defaults and results.

    from fastattn.flash_attn import flash_attn_func    # instead of: from flash_attn import …
    fastattn.flash_attn.install()                      # or: everything that imports flash_attn

The semantics are those of flash_attn 2.8 (Dao, FlashAttention-2, 2023). All tensors are
(B, S, H, D) or packed (T, H, D). What is more general here: fp32, every device and head dim that
`attention` takes, pages of any size, softcap together with dropout, and a differentiable lse. What
differs: a row that sees no key has lse −inf (theirs is +inf, which can't be merged with another),
and S_dmask has the sequences' own lengths instead of multiples of 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import bert_padding, reference, weights
from .attention import autocast, dense_problem, packed_problem, run, with_seed
from .decode import attention_decode
from .flash_attn_install import install, uninstall
from .problem import AttentionProblem, last_stride_one

__all__ = [
    "bert_padding",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """Attention of q (B, S_q, H_q, D) over k and v (B, S_k, H_k, D).

    Causal and windows are bottom-right aligned; a negative window side is unlimited. Gradients flow
    to q, k and v. `deterministic` is or-ed with torch.are_deterministic_algorithms_enabled().

    Returns:
        out (B, S_q, H_q, D); with `return_attn_probs` also softmax_lse (B, H_q, S_q), fp32, and
        S_dmask: the weights (B, H_q, S_q, S_k) in q's dtype, negative where dropped; empty without
        dropout.

    Raises:
        As `fastattn.attention`.
    """
    options = (causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p)
    return _results(_dense(q, k, v, options), None, deterministic, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_func` with kv (B, S_k, 2, H_k, D), whose gradient comes in one piece."""
    kv = _packed(kv, 2, 5)
    k, v = kv.unbind(-3)
    options = (causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p)
    return _results(_dense(q, k, v, options), kv, deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_func` with qkv (B, S, 3, H, D), whose gradient comes in one piece."""
    qkv = _packed(qkv, 3, 5)
    q, k, v = qkv.unbind(-3)
    options = (causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p)
    return _results(_dense(q, k, v, options), qkv, deterministic, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
):
    """`flash_attn_func` over packed sequences: q (T_q, H_q, D), k and v (T_k, H_k, D).

    cu_seqlens_q and cu_seqlens_k (B + 1,) int32 are where sequences begin and end. With block_table
    (B, pages a sequence) int32, k and v are (pages, page_size, H_k, D) and are gathered into packed
    copies first.

    Returns:
        out (T_q, H_q, D); with `return_attn_probs` also softmax_lse (H_q, T_q) and S_dmask
        (B, H_q, max_seqlen_q, max_seqlen_k), 0 past a sequence's end.
    """
    if block_table is not None:
        k, v = _gather_pages(k, v, cu_seqlens_k, block_table)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p)
    return _results(_varlen(q, k, v, lengths, options), None, deterministic, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_varlen_func` with kv (T_k, 2, H_k, D), whose gradient comes in one piece."""
    kv = _packed(kv, 2, 4)
    k, v = kv.unbind(-3)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p)
    return _results(_varlen(q, k, v, lengths, options), kv, deterministic, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """`flash_attn_varlen_func` with qkv (T, 3, H, D), whose gradient comes in one piece."""
    qkv = _packed(qkv, 3, 4)
    q, k, v = qkv.unbind(-3)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = (causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p)
    return _results(_varlen(q, k, v, lengths, options), qkv, deterministic, return_attn_probs)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
):
    """Attention of q (B, S_q, H_q, D) over a KV cache that k and v are first written to, in place.

    Args:
        k_cache, v_cache: (B_cache, S_cache, H_k, D), or with `block_table` (pages, page_size, H_k,
            D).
        k, v: (B, S_new, H_k, D), written at positions cache_seqlens[b] + i.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2): rotate new keys at their positions and
            queries at cache_seqlens[b] + i (all at cache_seqlens[b] without causal or a window).
        cache_seqlens: keys in the cache before: (B,) int32, one int for all, or None: it is full.
        cache_batch_idx: (B,) int32: the row of the cache each sequence uses; the first B otherwise.
        cache_leftpad: (B,) int32: keys before it are not seen.
        rotary_interleaved: pairs are dims (2i, 2i + 1), else (i, i + rotary_dim / 2).
        num_splits: of the keys, for parallelism; 0 chooses.

    Returns:
        out (B, S_q, H_q, D); with `return_softmax_lse` also lse (B, H_q, S_q). As in flash_attn,
        neither has a gradient.

    Raises:
        As `fastattn.attention_decode`; ValueError also for k and v without cache_seqlens.
    """
    batch = q.shape[0]
    if cache_seqlens is None:
        if k is not None:
            raise ValueError("k and v are appended at cache_seqlens, which must be given with them")
        pages = 1 if block_table is None else block_table.shape[1]
        cache_seqlens = pages * k_cache.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if block_table is None and cache_batch_idx is None:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    return attention_decode(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        causal=causal,
        window=_window(window_size),
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
    )


def _packed(packed: Tensor, parts: int, ndim: int) -> Tensor:
    """A tensor (…, parts, H, D), checked, as its parts are to be given to the kernels."""
    if packed.dim() != ndim or packed.shape[-3] != parts:
        lead = "(tokens, " if ndim == 4 else "(batch, sequence, "
        raise ValueError(
            f"expected a packed tensor {lead}{parts}, heads, head_dim), got {tuple(packed.shape)}"
        )
    (packed,) = autocast(packed)
    return last_stride_one(packed)


def _dense(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> AttentionProblem:
    return dense_problem(q, k, v, *_of_attention(*options))


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Tensor, Tensor, int, int], options: _Options
) -> AttentionProblem:
    return packed_problem(q, k, v, *lengths, *_of_attention(*options))


# causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p
_Options = tuple[bool, Window, float | None, float, Tensor | None, float]


def _of_attention(causal, window_size, softmax_scale, softcap, alibi_slopes, dropout_p):
    """The options of `attention`, in its order."""
    window, mask, bias, sinks = _window(window_size), None, None, None
    return causal, window, softmax_scale, softcap, mask, bias, alibi_slopes, sinks, dropout_p


def _window(window_size: Window) -> Window:
    """Ours: −1 alone is unlimited."""
    left, right = window_size
    return max(left, -1), max(right, -1)


def _results(
    p: AttentionProblem, packed: Tensor | None, deterministic: bool, return_attn_probs: bool
):
    if return_attn_probs:
        p = with_seed(p)  # S_dmask is of the dropout that out has
    out, lse = run(p, deterministic or None, packed=packed)
    return (out, lse, _signed_weights(p, lse)) if return_attn_probs else out


@torch.no_grad()
def _signed_weights(p: AttentionProblem, lse: Tensor) -> Tensor:
    """S_dmask: undropped weights, negative where dropped; (0,) without dropout."""
    if p.dropout_p == 0:
        return p.q.new_empty(0)
    if not p.packed:
        return _signed(p, lse, 0)
    assert p.cu_seqlens_q is not None
    batch, heads = p.cu_seqlens_q.shape[0] - 1, p.q.shape[1]
    signed = p.q.new_zeros(batch, heads, p.max_seqlen_q, p.max_seqlen_k)
    for number, rows, _, sequence in reference.packed_sequences(p):
        block = _signed(sequence, lse[None, :, rows], number)
        signed[number, :, : block.shape[2], : block.shape[3]] = block[0]
    return signed


def _signed(p: AttentionProblem, lse: Tensor, first_batch: int) -> Tensor:
    plain = weights.weights_of(p, lse)
    kept = reference.dropout_scale(p, plain, first_batch) > 0
    return torch.where(kept, plain, -plain).to(p.q.dtype)


def _gather_pages(
    k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    """(pages, page_size, H_k, D) caches to packed (T_k, H_k, D). Waits for the device, for T_k."""
    page_size = k.shape[1]
    offsets = cu_seqlens_k.long()
    tokens, lengths = int(offsets[-1]), offsets.diff()
    sequence = torch.repeat_interleave(lengths, output_size=tokens)  # (T_k,)
    position = torch.arange(tokens, device=k.device) - offsets[sequence]
    page = block_table[sequence, position // page_size].long()
    place = page * page_size + position % page_size
    return k.flatten(0, 1).index_select(0, place), v.flatten(0, 1).index_select(0, place)
