"""The operators `torch.ops.fastattn.*`: schemas, fakes, device entries; registered at import.

An operator takes a problem (fastattn/problem.py) field by field and a backend name or None. Its
entry checks the values that address memory and asks the backend table, both on the real tensors: a
compiled or exported graph carries neither. Raw operators have no autograd: fastattn/attention.py
and fastattn/losses.py put autograd.Functions around them. No backend is imported here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, chunked_loss, products, validate
from .problem import (
    AttentionProblem,
    CrossEntropyProblem,
    DecodeProblem,
    LinearCrossEntropyProblem,
    QKVGradients,
    split,
)

_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks,"
    " Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt window_left, SymInt window_right,"
    " float scale, float softcap, float dropout_p"
)
_DECODE = (
    "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k, Tensor? v,"
    " Tensor? rotary_cos, Tensor? rotary_sin, Tensor? block_table, Tensor? cache_batch_idx,"
    " Tensor? cache_leftpad, Tensor? alibi_slopes, Tensor? sinks, bool rotary_interleaved,"
    " SymInt window_left, SymInt window_right, float scale, float softcap, int num_splits"
)
_DECODE_READ = _DECODE.replace("(a!)", "").replace("(b!)", "")
_CE_OPTIONS = (
    "Tensor target, Tensor? weight, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap"
)
_LINEAR_CE = f"Tensor x, Tensor linear_weight, Tensor? linear_bias, {_CE_OPTIONS}"

_LIB = torch.library.Library("fastattn", "DEF")


def _define(name: str, schema: str, entry, fake) -> None:
    _LIB.define(f"{name}{schema}")
    for key in ("CPU", "CUDA"):
        _LIB.impl(name, entry, key)
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIB)


# ---- attention ----


def _attn_fwd(*args):
    p, (backend,) = split(AttentionProblem, args)
    validate.packed_offsets(p)
    return backends.choose(p, backend).attn_fwd(p)


def _attn_fwd_fake(*args):
    p, _ = split(AttentionProblem, args)
    out = p.q.new_empty((*p.q.shape[:-1], p.v.shape[-1]))
    return out, p.q.new_empty(p.lse_shape, dtype=validate.accumulator_dtype(p.q))


def _attn_entropy(*args):
    p, (lse, backend) = split(AttentionProblem, args)
    validate.packed_offsets(p)
    return backends.choose(p, backend).attn_entropy(p, lse)


def _attn_bwd(*args):
    p, (out, lse, dout, dlse, deterministic, backend) = split(AttentionProblem, args)
    grads = backends.choose(p, backend).attn_bwd(p, out, lse, dout, dlse, deterministic)
    return tuple(p.q.new_empty(0) if g is None else g for g in grads)


def _attn_bwd_into(*args):
    p, (out, lse, dout, dlse, deterministic, *into, backend) = split(AttentionProblem, args)
    row = backends.choose(p, backend)
    row.attn_bwd(p, out, lse, dout, dlse, deterministic, QKVGradients(*into))


def _attn_bwd_fake(*args):
    p, _ = split(AttentionProblem, args)

    def like(t: Tensor | None) -> Tensor:
        return p.q.new_empty(0) if t is None else t.new_empty(t.shape)

    return like(p.q), like(p.k), like(p.v), like(p.bias), like(p.sinks)


_define(
    "attn_fwd",
    f"({_ATTENTION}, str? backend) -> (Tensor out, Tensor lse)",
    _attn_fwd,
    _attn_fwd_fake,
)
# The same for a problem without bias and sinks, into tensors that are given.
_define(
    "attn_bwd_into",
    f"({_ATTENTION}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool deterministic,"
    " Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, str? backend) -> ()",
    _attn_bwd_into,
    lambda *_: None,
)
# Of rows, before dropout, from their lse; v is not looked at.
_define(
    "attn_entropy",
    f"({_ATTENTION}, Tensor lse, str? backend) -> Tensor entropy",
    _attn_entropy,
    lambda *args: torch.empty_like(split(AttentionProblem, args)[1][0]),
)
# dbias and dsinks are empty where the problem has no bias or sinks: schemas can't return None.
_define(
    "attn_bwd",
    f"({_ATTENTION}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool deterministic,"
    " str? backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    _attn_bwd,
    _attn_bwd_fake,
)


# ---- decode ----


def _attn_decode(*args):
    p, (backend,) = split(DecodeProblem, args)
    validate.cache_indices(p)
    return backends.choose(p, backend).attn_decode(p)


def _attn_decode_fake(*args):
    p, _ = split(DecodeProblem, args)
    batch, seqlen_q, heads, _ = p.q.shape
    out = p.q.new_empty((batch, seqlen_q, heads, p.v_cache.shape[-1]))
    return out, p.q.new_empty((batch, heads, seqlen_q), dtype=validate.accumulator_dtype(p.q))


_define(
    "attn_decode",
    f"({_DECODE}, str? backend) -> (Tensor out, Tensor lse)",
    _attn_decode,
    _attn_decode_fake,
)
# The same for a problem without new keys: a compiler that is told of writes would copy the caches,
# and torch's mixes up those of one storage, when the graph also writes to them itself.
_define(
    "attn_decode_read",
    f"({_DECODE_READ}, str? backend) -> (Tensor out, Tensor lse)",
    _attn_decode,
    _attn_decode_fake,
)


# ---- cross-entropy ----


def _cross_entropy_fwd(*args):
    p, (backend,) = split(CrossEntropyProblem, args)
    validate.targets(p.target, p.logits.shape[1], p.ignore_index)
    return backends.choose(p, backend).cross_entropy_fwd(p, None, None)


def _cross_entropy_bwd(*args):
    p, (lse, dloss, dlse, backend) = split(CrossEntropyProblem, args)
    return backends.choose(p, backend).cross_entropy_bwd(p, lse, dloss, dlse)


def _cross_entropy_fwd_bwd(*args):
    p, (dloss, backend) = split(CrossEntropyProblem, args)
    validate.targets(p.target, p.logits.shape[1], p.ignore_index)
    dlogits = p.logits.new_empty(p.logits.shape)
    loss, _ = backends.choose(p, backend).cross_entropy_fwd(p, dloss, dlogits)
    return loss, dlogits


def _cross_entropy_fwd_bwd_(*args):
    p, (dloss, backend) = split(CrossEntropyProblem, args)
    validate.targets(p.target, p.logits.shape[1], p.ignore_index)
    return backends.choose(p, backend).cross_entropy_fwd(p, dloss, p.logits)


def _loss_and_lse_fake(logits: Tensor, *_):
    rows = logits.new_empty(logits.shape[:1], dtype=validate.accumulator_dtype(logits))
    return rows, torch.empty_like(rows)


_define(
    "cross_entropy_fwd",
    f"(Tensor logits, {_CE_OPTIONS}, str? backend) -> (Tensor loss, Tensor lse)",
    _cross_entropy_fwd,
    _loss_and_lse_fake,
)
_define(
    "cross_entropy_bwd",
    f"(Tensor logits, {_CE_OPTIONS}, Tensor lse, Tensor dloss, Tensor? dlse, str? backend)"
    " -> Tensor dlogits",
    _cross_entropy_bwd,
    lambda logits, *_: logits.new_empty(logits.shape),
)
# One pass: the loss, and the gradient dloss · ∂loss.
_define(
    "cross_entropy_fwd_bwd",
    f"(Tensor logits, {_CE_OPTIONS}, Tensor dloss, str? backend) -> (Tensor loss, Tensor dlogits)",
    _cross_entropy_fwd_bwd,
    lambda logits, *_: (_loss_and_lse_fake(logits)[0], logits.new_empty(logits.shape)),
)
# The same, the gradient left in the logits' own buffer.
_define(
    "cross_entropy_fwd_bwd_",
    f"(Tensor(a!) logits, {_CE_OPTIONS}, Tensor dloss, str? backend) -> (Tensor loss, Tensor lse)",
    _cross_entropy_fwd_bwd_,
    _loss_and_lse_fake,
)


# ---- linear layers ----


def _linear_layer(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    own = backends.own_products(x.device, backend) or products.torchs(x.device)
    out = x.new_empty((x.shape[0], weight.shape[0]))
    if bias is not None:
        out.copy_(bias)
    own.multiply(own.operand(x), own.operand(weight).t(), out, accumulate=bias is not None)
    return out


_define(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, str? backend) -> Tensor",  # all fp32
    _linear_layer,
    lambda x, weight, *_: x.new_empty((x.shape[0], weight.shape[0])),
)


# ---- linear cross-entropy ----


def _linear(compute):
    """An entry: `compute` on a checked problem, its products in fp32 whatever autocast says."""

    def entry(*args):
        p, rest = split(LinearCrossEntropyProblem, args)
        validate.targets(p.target, p.linear_weight.shape[0], p.ignore_index)
        with torch.autocast(p.x.device.type, enabled=False):
            return compute(p, *rest)

    return entry


def _linear_cross_entropy_bwd_fake(*args):
    p, _ = split(LinearCrossEntropyProblem, args)
    dbias_shape = (0,) if p.linear_bias is None else p.linear_bias.shape
    dw = p.linear_weight.new_empty(p.linear_weight.shape)
    return p.x.new_empty(p.x.shape), dw, dw.new_empty(dbias_shape)


def _linear_cross_entropy_fwd_bwd_fake(*args):
    p, (_, want_dx, want_dw, want_dbias, *_) = split(LinearCrossEntropyProblem, args)

    def empty(wanted: bool, shape: tuple[int, ...], dtype=torch.float32) -> Tensor:
        return p.x.new_empty(shape if wanted else (0,), dtype=dtype)

    weight_shape = p.linear_weight.shape
    return (
        empty(True, ()),
        empty(want_dx, p.x.shape, chunked_loss.dx_dtype(p.x)),
        empty(want_dw, weight_shape),
        empty(want_dbias, weight_shape[:1]),
    )


_define(
    "linear_cross_entropy_fwd",
    f"({_LINEAR_CE}, int workspace_bytes, str? backend) -> (Tensor loss, Tensor lse)",
    _linear(chunked_loss.forward),
    lambda x, *_: tuple(x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2)),
)
_define(
    "linear_cross_entropy_bwd",
    f"({_LINEAR_CE}, Tensor lse, Tensor dloss, Tensor? dlse, int workspace_bytes, str? backend)"
    " -> (Tensor dx, Tensor dw, Tensor dbias)",
    _linear(chunked_loss.backward),
    _linear_cross_entropy_bwd_fake,
)
# The reduced loss and the gradients that are wanted, in one go: see chunked_loss.forward_backward.
_define(
    "linear_cross_entropy_fwd_bwd",
    f"({_LINEAR_CE}, Tensor scale, bool want_dx, bool want_dw, bool want_dbias,"
    " int workspace_bytes, str? backend)"
    " -> (Tensor loss, Tensor dx, Tensor dw, Tensor dbias)",
    _linear(chunked_loss.forward_backward),
    _linear_cross_entropy_fwd_bwd_fake,
)
