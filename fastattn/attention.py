"""The public attention functions: validate, normalise into a problem, run it with autograd.

Method: exact softmax(QKᵀ/√d)V with online softmax and recomputation in the backward pass (Dao et al., FlashAttention, 2022;
Dao, FlashAttention-2, 2023). Semantics are fixed in docs/design.md §3 and specified by fastattn/reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, reference, validate
from .backends import Explanation, requested
from .problem import AttentionProblem, DecodeProblem

_FIELDS = len(AttentionProblem._fields)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
):
    """Exact attention softmax(scale·QKᵀ)V, fused.

    Args:
        q: (B, S_q, H_q, D), float16, bfloat16, float32, or float64 (which only the reference computes).
        k: (B, S_k, H_k, D), v: (B, S_k, H_k, D_v), of q's dtype and device. H_q is a multiple of H_k: query head h reads KV head
            h // (H_q / H_k). 1 ≤ D, D_v ≤ 256. Any strides whose last is 1 are taken as they are; others are copied.
        causal: query i sees keys j ≤ i + S_k − S_q (bottom-right aligned).
        window: (left, right), inclusive: i + S_k − S_q − left ≤ j ≤ i + S_k − S_q + right; −1 = unlimited. With `causal`, right is 0.
        scale: multiplies QKᵀ; D ** −0.5 by default.
        softcap: if > 0, scores s become softcap · tanh(s / softcap), before bias.
        mask: bool, True = attend; broadcasts to (B, H_q, S_q, S_k).
        bias: float, added to the scores; broadcasts alike; differentiable.
        alibi_slopes: (H_q,) or (B, H_q); adds −slope · |i + S_k − S_q − j|. A constant: it gets no gradient.
        sinks: (H_q,): one logit a head that joins the softmax sum and has no value; differentiable.
        dropout_p: probability of dropping a weight, in [0, 1]. The Philox seed is drawn from torch's generator of q's device.
        deterministic: None follows torch.are_deterministic_algorithms_enabled().
        return_lse: also return the log-sum-exp of each row.
        backend: name of one backend (see `explain`); None chooses. What is asked for runs, or it raises.

    Returns:
        out (B, S_q, H_q, D_v) in q's dtype; with `return_lse` also lse (B, H_q, S_q), fp32, natural log, differentiable.
        A row that sees no key gives out 0 and lse −inf, and zero gradients.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; before any kernel runs.
        RuntimeError: the requested backend can't take the problem (the reason is named), or a second backward was asked of a
            fused backend (backend="reference" is twice differentiable).
    """
    q, k, v = _autocast(q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        validate.tensor(name, t, 4)
    validate.same_dtype_and_device(q=q, k=k, v=v)
    validate.attention_shapes(q, k, v)
    p = _problem(q, k, v, None, None, q.shape[1], k.shape[1], causal, window, scale, softcap, mask, bias,
                 alibi_slopes, sinks, dropout_p)  # fmt: skip
    out, lse = _run(p, deterministic, backend)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str | None = None,
):
    """`attention` over packed sequences: sequence b is q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]] and so for k, v.

    Args:
        q: (T_q, H_q, D); k: (T_k, H_k, D); v: (T_k, H_k, D_v).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, rising from 0 to T_q and T_k. Sequences may be empty.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        mask, bias: broadcast to (B, H_q, max_seqlen_q, max_seqlen_k), indexed by positions inside each sequence.
        The rest, and what is raised, is as in `attention`.

    Returns:
        out (T_q, H_q, D_v); with `return_lse` also lse (H_q, T_q).
    """
    q, k, v = _autocast(q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        validate.tensor(name, t, 3)
    validate.same_dtype_and_device(q=q, k=k, v=v)
    validate.attention_shapes(q, k, v)
    cu_seqlens_q = validate.offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], q.device)
    cu_seqlens_k = validate.offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have the same length, got {cu_seqlens_q.shape[0]} and "
            f"{cu_seqlens_k.shape[0]}"
        )
    for name, offsets, longest in (
        ("max_seqlen_q", cu_seqlens_q, max_seqlen_q),
        ("max_seqlen_k", cu_seqlens_k, max_seqlen_k),
    ):
        on_host = offsets.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and offsets.shape[0] > 1 and (found := int(offsets.diff().max())) > longest:
            raise ValueError(f"{name} is {longest} but the longest sequence has {found} tokens")
    p = _problem(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window, scale, softcap,
                 mask, bias, alibi_slopes, sinks, dropout_p)  # fmt: skip
    out, lse = _run(p, deterministic, backend)
    return (out, lse) if return_lse else out


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
    """`torch.nn.functional.scaled_dot_product_attention` on fastattn's kernels: same signature, same semantics.

    Args:
        query: (…, H_q, S_q, D); key: (…, H_k, S_k, D); value: (…, H_k, S_k, D_v); H_q == H_k unless `enable_gqa`.
        attn_mask: bool (True = attend) or float (added, differentiable); broadcasts to (…, H_q, S_q, S_k).
        is_causal: query i sees keys j ≤ i: aligned top-left, unlike `attention`. Not together with attn_mask.

    Returns:
        (…, H_q, S_q, D_v). A fully masked row gives 0, as torch's fused backends do.

    Raises:
        As `attention`; ValueError also for `is_causal` with `attn_mask`, and for unequal heads without `enable_gqa`.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        validate.tensor(name, t)
        if t.dim() < 3:
            raise ValueError(f"{name} must have at least 3 dimensions, got shape {tuple(t.shape)}")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal and attn_mask can't both be given")
    if not enable_gqa and query.dim() > 3 and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"query has {query.shape[-3]} heads and key {key.shape[-3]}; enable_gqa=True allows that"
        )
    batch = query.shape[:-3]
    q, k, v = (t.reshape(-1, *t.shape[-3:]).transpose(1, 2) for t in (query, key, value))
    window = (-1, -1)
    if is_causal:  # top-left is bottom-right once keys nobody sees are cut off and queries past the last key see all
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
        window = (-1, q.shape[1] - k.shape[1])
    mask = bias = None
    if attn_mask is not None:
        if attn_mask.dim() > 4:
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).reshape(-1, *attn_mask.shape[-3:])
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    out = attention(q, k, v, window=window, scale=scale, mask=mask, bias=bias, dropout_p=dropout_p)
    return out.transpose(1, 2).reshape(*batch, query.shape[-3], query.shape[-2], value.shape[-1])


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
    """A few queries against a KV cache, which new keys and values are appended to in place. Inference only: no backward.

    Sequence b then has L_b = cache_seqlens[b] + S_new keys; causal and window align query S_q − 1 with key L_b − 1.

    Args:
        q: (B, S_q, H_q, D), before rotary.
        k_cache: (B_cache, S_cache, H_k, D), v_cache: (B_cache, S_cache, H_k, D_v); with `block_table` (pages, page_size, H_k, ·).
        cache_seqlens: (B,) int32, keys in the cache before the append.
        block_table: (B, pages per sequence) int32: position j of sequence b lives in page block_table[b, j // page_size].
        k, v: (B, S_new, H_k, D) and (B, S_new, H_k, D_v), written at positions cache_seqlens[b] + i. Both or neither.
        rotary_cos, rotary_sin: (positions, R), R ≤ D / 2, of q's dtype: rotate new keys at their positions and queries at
            cache_seqlens[b] + i (all at cache_seqlens[b] when neither causal nor windowed). Both or neither.
        rotary_interleaved: pairs are dims (2i, 2i + 1) rather than (i, i + R).
        cache_batch_idx: (B,) int32: which row of the cache each sequence uses; not with `block_table`.
        cache_leftpad: (B,) int32: keys before it are not seen.
        num_splits: parts the keys are split into for parallelism; 0 chooses.
        The rest is as in `attention`.

    Returns:
        out (B, S_q, H_q, D_v); with `return_lse` also lse (B, H_q, S_q) fp32.

    Raises:
        As `attention`; ValueError also when the append would run past the cache, RuntimeError if a gradient is wanted.
    """
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        validate.tensor(name, t, 4)
    validate.same_dtype_and_device(
        q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k_cache, v_cache, k, v)):
        raise RuntimeError("attention_decode has no backward: call it under torch.no_grad(), or use attention")
    batch, seqlen_q, heads_q, head_dim = q.shape
    device = q.device
    validate.attention_shapes(q[0:0], k_cache[0:0], v_cache[0:0])  # heads and head dims, whatever the cache's rows
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} differ in more than D")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.stride(-1) != 1:
            raise ValueError(f"{name} is written in place, so its last dimension must have stride 1, got {t.stride()}")
    cache_seqlens = validate.index_tensor("cache_seqlens", cache_seqlens, (batch,), device)
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    seqlen_new = 0
    if k is not None and v is not None:
        seqlen_new = k.shape[1]
        for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
            want = (batch, seqlen_new, *cache.shape[2:])
            if tuple(t.shape) != want:
                raise ValueError(f"{name} must have shape {want}, got {tuple(t.shape)}")
        k, v = _last_stride_one(k), _last_stride_one(v)
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None and rotary_sin is not None:
        if rotary_cos.dim() != 2 or rotary_cos.shape != rotary_sin.shape or 2 * rotary_cos.shape[1] > head_dim:
            raise ValueError(
                f"rotary_cos and rotary_sin must both be (positions, at most {head_dim // 2}), got "
                f"{tuple(rotary_cos.shape)} and {tuple(rotary_sin.shape)}"
            )
        rotary_cos, rotary_sin = rotary_cos.contiguous(), rotary_sin.contiguous()
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx and block_table can't both be given")
        block_table = validate.index_tensor("block_table", block_table, (batch, -1), device)
        capacity = block_table.shape[1] * k_cache.shape[1]
    else:
        capacity = k_cache.shape[1]
        if cache_batch_idx is not None:
            cache_batch_idx = validate.index_tensor("cache_batch_idx", cache_batch_idx, (batch,), device)
        elif k_cache.shape[0] != batch:
            raise ValueError(f"k_cache has {k_cache.shape[0]} rows for a batch of {batch}; give cache_batch_idx")
    if cache_leftpad is not None:
        cache_leftpad = validate.index_tensor("cache_leftpad", cache_leftpad, (batch,), device)
    if device.type == "cpu" and batch and not torch.compiler.is_compiling():
        _check_cache_indices(cache_seqlens, seqlen_new, capacity, k_cache.shape[0], block_table, cache_batch_idx,
                             cache_leftpad, rotary_cos, seqlen_q)  # fmt: skip
    left, right = validate.window(causal, window)
    if alibi_slopes is not None:
        alibi_slopes = validate.per_head("alibi_slopes", alibi_slopes, heads_q, batch, device).detach().contiguous()
    if sinks is not None:
        sinks = validate.per_head("sinks", sinks, heads_q, None, device).contiguous()
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits must be an integer ≥ 0, got {num_splits!r}")
    p = DecodeProblem(
        _last_stride_one(q), k_cache, v_cache, cache_seqlens, k, v, rotary_cos, rotary_sin, block_table,
        cache_batch_idx, cache_leftpad, alibi_slopes, sinks, rotary_interleaved, left, right,
        head_dim**-0.5 if scale is None else float(scale), validate.number("softcap", softcap, 0), num_splits,
    )  # fmt: skip
    out, lse = torch.ops.fastattn.attn_decode(*p, requested(backend))
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Explanation:
    """Which backend `attention` with these arguments would run on, and why each other would not. Print it.

    Raises TypeError or ValueError on bad arguments, as `attention` does.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        validate.tensor(name, t, 4)
    validate.same_dtype_and_device(q=q, k=k, v=v)
    validate.attention_shapes(q, k, v)
    p = _problem(q, k, v, None, None, q.shape[1], k.shape[1], causal, window, scale, softcap, mask, bias,
                 alibi_slopes, sinks, dropout_p)  # fmt: skip
    return backends.explain_problem(p, backend)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, floating tensors other than fp64 become the autocast dtype, as for torch's own attention."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _last_stride_one(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqlen_q: int,
    seqlen_k: int,
    causal: bool,
    window: tuple[int, int],
    scale: float | None,
    softcap: float,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
) -> AttentionProblem:
    """Check and normalise all that `attention` and `attention_varlen` share."""
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0]
    heads, device = q.shape[-2], q.device
    left, right = validate.window(causal, window)
    if mask is not None:
        validate.tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = attend), got {mask.dtype}; use bias for added scores")
        validate.same_device("mask", mask, "q", q)
        mask = validate.score_shaped("mask", mask, batch, heads, seqlen_q, seqlen_k)
    if bias is not None:
        validate.tensor("bias", bias)
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating point, got {bias.dtype}; use mask for bool")
        validate.same_device("bias", bias, "q", q)
        bias = validate.score_shaped("bias", bias, batch, heads, seqlen_q, seqlen_k)
        if bias.dtype not in (q.dtype, torch.float32):
            bias = bias.to(torch.promote_types(q.dtype, torch.float32))
    if alibi_slopes is not None:
        alibi_slopes = validate.per_head("alibi_slopes", alibi_slopes, heads, batch, device).detach().contiguous()
    if sinks is not None:
        sinks = validate.per_head("sinks", sinks, heads, None, device).contiguous()
    dropout_p = validate.number("dropout_p", dropout_p, 0, 1)
    seed = torch.randint(2**63 - 1, (), device=device) if dropout_p > 0 else None
    return AttentionProblem(
        *(_last_stride_one(t) for t in (q, k, v)), mask, bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k,
        seqlen_q if packed else 0, seqlen_k if packed else 0, left, right,
        q.shape[-1] ** -0.5 if scale is None else float(scale), validate.number("softcap", softcap, 0), dropout_p,
    )  # fmt: skip


def _check_cache_indices(
    cache_seqlens: Tensor,
    seqlen_new: int,
    capacity: int,
    cache_rows: int,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    rotary_cos: Tensor | None,
    seqlen_q: int,
) -> None:
    """Values a kernel would index memory with; on the host only, where reading them is free."""
    low, high = (int(x) for x in cache_seqlens.aminmax())
    if low < 0 or high + seqlen_new > capacity:
        raise ValueError(
            f"cache_seqlens {cache_seqlens.tolist()} plus {seqlen_new} new keys must lie in [0, {capacity}], the cache's capacity"
        )
    if rotary_cos is not None and high + max(seqlen_new, seqlen_q) > rotary_cos.shape[0]:
        raise ValueError(
            f"rotary_cos has {rotary_cos.shape[0]} positions, but position {high + max(seqlen_new, seqlen_q) - 1} is needed"
        )
    if cache_batch_idx is not None and not 0 <= int(cache_batch_idx.min()) <= int(cache_batch_idx.max()) < cache_rows:
        raise ValueError(f"cache_batch_idx must lie in [0, {cache_rows}), got {cache_batch_idx.tolist()}")
    if cache_leftpad is not None and int(cache_leftpad.min()) < 0:
        raise ValueError(f"cache_leftpad must be ≥ 0, got {cache_leftpad.tolist()}")
    if block_table is not None and capacity:
        page_size = capacity // block_table.shape[1]
        for b, n in enumerate(cache_seqlens.tolist()):
            pages = block_table[b, : -(-(n + seqlen_new) // page_size)]
            if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < cache_rows:
                raise ValueError(f"block_table[{b}] must name pages in [0, {cache_rows}), got {pages.tolist()}")


def _run(p: AttentionProblem, deterministic: bool | None, backend: str | None) -> tuple[Tensor, Tensor]:
    name = requested(backend)
    # The reference runs as plain PyTorch, twice differentiable; fp64 has nothing else.
    if name == "reference" or (name is None and p.q.dtype == torch.float64):
        return reference.attention(p)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return AttentionFunction.apply(*p, deterministic, name)


NO_SECOND_BACKWARD = (
    "fastattn's fused kernels have no second backward; backend='reference' computes one (it is plain PyTorch)"
)


def vmap_by_loop(function: type[torch.autograd.Function]):
    """A vmap rule that runs `function` once for each element of the mapped dimension."""

    def rule(info, in_dims, *args):
        results = []
        for i in range(info.batch_size):
            picked = (a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))
            results.append(function.apply(*picked))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        outputs = tuple(None if r[0] is None else torch.stack(r) for r in zip(*results, strict=True))
        return outputs, tuple(None if r is None else 0 for r in outputs)

    return rule


class AttentionFunction(torch.autograd.Function):
    """(out, lse) of the problem's fields, `deterministic` and a backend name."""

    @staticmethod
    def forward(*args):
        *fields, _, backend = args
        return torch.ops.fastattn.attn_fwd(*fields, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *fields, ctx.deterministic, ctx.backend = inputs
        ctx.options = fields[10:]  # the numbers after the ten tensors
        ctx.save_for_backward(*fields[:10], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        args = (*tensors, *ctx.options, out, lse, dout, dlse, ctx.deterministic, ctx.backend)
        if torch.is_grad_enabled():  # create_graph=True: let a further backward say why it can't
            dq, dk, dv, dbias, dsinks = AttentionBackward.apply(*args)
        else:
            dq, dk, dv, dbias, dsinks = torch.ops.fastattn.attn_bwd(*args)
        has_bias, has_sinks = tensors[4] is not None, tensors[6] is not None
        grads = (dq, dk, dv, None, dbias if has_bias else None, None, dsinks if has_sinks else None)
        return grads + (None,) * (_FIELDS + 2 - len(grads))


class AttentionBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that vmap works on them and a second backward raises."""

    @staticmethod
    def forward(*args):
        return torch.ops.fastattn.attn_bwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(NO_SECOND_BACKWARD)


AttentionFunction.vmap = staticmethod(vmap_by_loop(AttentionFunction))
AttentionBackward.vmap = staticmethod(vmap_by_loop(AttentionBackward))
