"""The public attention functions: validate, normalise into a problem, run it with autograd.

Method: exact softmax(QKᵀ/√d)V with online softmax and recomputation in the backward pass (Dao et
al., FlashAttention, 2022; Dao, FlashAttention-2, 2023). Semantics are fixed in docs/design.md §3
and specified by fastattn/reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, nested, reference, validate
from .autograd import FusedFunction, gradient_function
from .backends import Explanation, requested
from .problem import AttentionProblem, last_stride_one

_FIELDS = len(AttentionProblem._fields)
_TENSORS = AttentionProblem._fields.index(
    "max_seqlen_q"
)  # the fields before it are tensors or None


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
        q: (B, S_q, H_q, D), float16, bfloat16, float32, or float64 (which only the reference
            computes).
        k: (B, S_k, H_k, D), v: (B, S_k, H_k, D_v), of q's dtype and device. H_q is a multiple of
            H_k: query head h reads KV head h // (H_q / H_k). 1 ≤ D, D_v ≤ 256. Any strides whose
            last is 1 are taken as they are; others are copied. All three may be nested tensors of
            layout torch.jagged, (B, j, H, D): then this is `attention_varlen` on their values, out
            is jagged as q is, mask, bias and lse are as there.
        causal: query i sees keys j ≤ i + S_k − S_q (bottom-right aligned).
        window: (left, right), inclusive: i + S_k − S_q − left ≤ j ≤ i + S_k − S_q + right; −1 =
            unlimited. With `causal`, right is 0.
        scale: multiplies QKᵀ; D ** −0.5 by default.
        softcap: if > 0, scores s become softcap · tanh(s / softcap), before bias.
        mask: bool, True = attend; broadcasts to (B, H_q, S_q, S_k).
        bias: float, added to the scores; broadcasts alike; differentiable.
        alibi_slopes: (H_q,) or (B, H_q); adds −slope · |i + S_k − S_q − j|. A constant: it gets no
            gradient.
        sinks: (H_q,): one logit a head that joins the softmax sum and has no value; differentiable.
        dropout_p: probability of dropping a weight, in [0, 1]. The Philox seed is drawn from
            torch's generator of q's device.
        deterministic: None follows torch.are_deterministic_algorithms_enabled().
        return_lse: also return the log-sum-exp of each row.
        backend: name of one backend (see `explain`); None chooses.

    What `backend` or FASTATTN_BACKEND asks for is what runs, or it raises. Under autocast, q, k
    and v become its dtype.

    Returns:
        out (B, S_q, H_q, D_v) in q's dtype; with `return_lse` also lse (B, H_q, S_q), fp32, natural
        log, differentiable. A row that sees no key gives out 0, lse −inf and zero gradients.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; before
            any kernel runs.
        RuntimeError: the requested backend can't take the problem (the reason is named), or a
            second backward was asked of a fused backend (backend="reference" is twice
            differentiable).
    """
    options = (causal, window, scale, softcap, mask, bias, alibi_slopes, sinks, dropout_p)
    if isinstance(q, Tensor) and q.is_nested:
        p = packed_problem(*nested.pack(q, k, v, mask, bias), *options)
        out, lse = run(p, deterministic, backend)
        out = nested.like(out, q)
    else:
        out, lse = run(dense_problem(q, k, v, *options), deterministic, backend)
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
    """`attention` over packed sequences: sequence b is q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]].

    Args:
        q: (T_q, H_q, D); k: (T_k, H_k, D); v: (T_k, H_k, D_v).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, rising from 0 to T_q and T_k. Sequences may be
            empty.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        mask, bias: broadcast to (B, H_q, max_seqlen_q, max_seqlen_k), indexed by positions inside
            each sequence.
        The rest, and what is raised, is as in `attention`.

    Returns:
        out (T_q, H_q, D_v); with `return_lse` also lse (H_q, T_q).
    """
    p = packed_problem(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal, window, scale, softcap, mask, bias, alibi_slopes, sinks, dropout_p,
    )  # fmt: skip
    out, lse = run(p, deterministic, backend)
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
    """Which backend `attention` with these arguments would run on, and why no other. Print it.

    Raises TypeError or ValueError on bad arguments, as `attention` does.
    """
    p = dense_problem(
        q, k, v, causal, window, scale, softcap, mask, bias, alibi_slopes, sinks, dropout_p
    )
    return backends.explain_problem(p, backend)


# All but "meta", that is. Asked once: torch.compile of torch 2.11 can't trace the question.
AUTOCAST_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla"))
)


def autocasting(t: Tensor) -> bool:
    device = t.device.type
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, floating tensors but fp64 ones in its dtype, as for torch's own attention."""
    first = tensors[0]
    if not isinstance(first, Tensor):  # validation will say so
        return tensors
    if not autocasting(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(t: Any) -> Any:
        narrow = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if narrow else t

    return tuple(cast(t) for t in tensors)


# ---- from arguments to a problem, from a problem to a result ----


def dense_problem(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> AttentionProblem:
    """The checked problem of `attention`'s arguments, `causal` to `dropout_p` in its order."""
    q, k, v = autocast(q, k, v)
    _check_qkv(q, k, v, 4)
    return _problem(AttentionProblem(q, k, v), q.shape[0], q.shape[1], k.shape[1], *options)


def packed_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> AttentionProblem:
    """The checked problem of `attention_varlen`'s arguments, like `dense_problem`."""
    q, k, v = autocast(q, k, v)
    _check_qkv(q, k, v, 3)
    cu_seqlens_q = validate.index_tensor("cu_seqlens_q", cu_seqlens_q, (-1,), q.device)
    cu_seqlens_k = validate.index_tensor("cu_seqlens_k", cu_seqlens_k, (-1,), q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] < 1:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must both have batch + 1 entries, got"
            f" {cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )
    packed = AttentionProblem(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    batch = cu_seqlens_q.shape[0] - 1
    return _problem(packed, batch, max_seqlen_q, max_seqlen_k, *options)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, ndim: int) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        validate.tensor(name, t, ndim)
    validate.same_dtype_and_device(q=q, k=k, v=v)
    validate.attention_shapes(q, k, v)


def _problem(
    p: AttentionProblem,
    batch: int,
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
    """`p`, which has q, k, v and offsets, with the checked options that all entry points share."""
    q, scores = p.q, (batch, p.q.shape[-2], seqlen_q, seqlen_k)
    if mask is not None:
        if validate.tensor("mask", mask).dtype != torch.bool:
            raise TypeError(
                f"mask must be bool (True = attend), got {mask.dtype}; bias is for numbers"
            )
        validate.same_device("mask", mask, "q", q.device)
        mask = validate.score_shaped("mask", mask, *scores)
    if bias is not None:
        if not validate.tensor("bias", bias).is_floating_point():
            raise TypeError(f"bias must be floating point, got {bias.dtype}; mask is for bool")
        validate.same_device("bias", bias, "q", q.device)
        bias = validate.score_shaped("bias", bias, *scores)
        if bias.dtype not in (q.dtype, torch.float32):
            bias = bias.to(validate.accumulator_dtype(q))
    if alibi_slopes is not None:
        alibi_slopes = validate.per_head("alibi_slopes", alibi_slopes, q, batch).detach()
    if sinks is not None:
        sinks = validate.per_head("sinks", sinks, q, None)
    left, right = validate.window(causal, window)
    return p._replace(
        q=last_stride_one(q),
        k=last_stride_one(p.k),
        v=last_stride_one(p.v),
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        window_left=left,
        window_right=right,
        scale=q.shape[-1] ** -0.5 if scale is None else validate.number("scale", scale),
        softcap=validate.number("softcap", softcap, 0),
        dropout_p=validate.number("dropout_p", dropout_p, 0, 1),
    )


def with_seed(p: AttentionProblem) -> AttentionProblem:
    """p with a fresh Philox key, where it has dropout and none yet."""
    if p.dropout_p > 0 and p.seed is None:
        return p._replace(seed=torch.randint(2**63 - 1, (), device=p.q.device))
    return p


def run(
    p: AttentionProblem,
    deterministic: bool | None = None,
    backend: str | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked problem, with autograd.

    `packed`: what k and v, or q, k and v, are views of, (…, 2 or 3, H, D). Its gradient is then
    made in one piece; p has neither bias nor sinks.
    """
    name = requested(backend)
    p = with_seed(p)
    # The reference, all there is for fp64, runs as plain PyTorch, twice differentiable; but as an
    # operator, as the others, when it is compiled, for it looks into tensors.
    reference_asked = name == "reference" or (name is None and p.q.dtype == torch.float64)
    if reference_asked and not torch.compiler.is_compiling():
        validate.packed_offsets(p)
        return reference.attention(p)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    qkv: tuple[Tensor | None, ...] = p[:3]
    if packed is not None:
        qkv = (p.q if packed.shape[-3] == 2 else None, packed, None)
    return AttentionFunction.run(*qkv, *p[3:], deterministic, name)


class AttentionFunction(FusedFunction):
    """(out, lse) of the problem's fields, `deterministic` and a backend name.

    In place of q, k and v there may be what they are views of: (q, kv, None) or (None, qkv, None).
    """

    @staticmethod
    def forward(*args):
        q, k, v, *fields, _, backend = args
        return torch.ops.fastattn.attn_fwd(*_parts(q, k, v), *fields, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *fields, ctx.deterministic, ctx.backend = inputs
        ctx.options = fields[_TENSORS:]
        ctx.save_for_backward(*fields[:_TENSORS], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        args = (*tensors, *ctx.options, out, lse, dout, dlse, ctx.deterministic, ctx.backend)
        if tensors[2] is None:
            grads = PackedGradient.run(*args)
        else:
            dq, dk, dv, dbias, dsinks = AttentionGradient.run(*args)
            dbias = None if tensors[4] is None else dbias
            dsinks = None if tensors[6] is None else dsinks
            grads = (dq, dk, dv, None, dbias, None, dsinks)
        return *grads, *(None,) * (_FIELDS + 2 - len(grads))


def _parts(q: Tensor | None, k: Tensor, v: Tensor | None) -> tuple[Tensor | None, ...]:
    if v is not None:
        return q, k, v
    parts = k.unbind(-3)
    return parts if q is None else (q, *parts)


def _packed_gradient(q: Tensor | None, packed: Tensor, v: None, *rest: Any):
    *others, backend = rest
    dq = None if q is None else q.new_empty(q.shape)
    dpacked = packed.new_empty(packed.shape)
    into = _parts(dq, dpacked, None)
    torch.ops.fastattn.attn_bwd_into(*_parts(q, packed, None), *others, *into, backend)
    return dq, dpacked


AttentionGradient = gradient_function(torch.ops.fastattn.attn_bwd)
PackedGradient = gradient_function(_packed_gradient)
