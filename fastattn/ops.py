"""The operators `torch.ops.fastattn.*`: schemas, fakes and device entries, all registered at import.

An operator takes a problem (fastattn/problem.py) field by field and a backend name or None. Its entry asks the backend table on
the real tensors, so a compiled or exported graph carries no decision. Raw operators have no autograd: fastattn/attention.py and
fastattn/losses.py put autograd.Functions around them. No backend is imported here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, chunked_loss
from .chunked_loss import LinearCrossEntropyProblem
from .problem import AttentionProblem, CrossEntropyProblem, DecodeProblem

_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "SymInt window_left, SymInt window_right, float scale, float softcap, float dropout_p"
)
_DECODE = (
    "Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? k, Tensor? v, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? block_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, "
    "Tensor? alibi_slopes, Tensor? sinks, bool rotary_interleaved, SymInt window_left, SymInt window_right, "
    "float scale, float softcap, int num_splits"
)
_CE_OPTIONS = (
    "Tensor target, Tensor? weight, int ignore_index, float label_smoothing, float z_loss, float softcap"
)

_LIB = torch.library.Library("fastattn", "DEF")


def _define(name: str, schema: str, entry, fake) -> None:
    _LIB.define(f"{name}{schema}")
    for key in ("CPU", "CUDA"):
        _LIB.impl(name, entry, key)
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_LIB)


# ---- attention ----


def _lse_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _attn_fwd(*args):
    p, backend = AttentionProblem(*args[:-1]), args[-1]
    return backends.choose(p, backend).attn_fwd(p)


def _attn_fwd_fake(*args):
    p = AttentionProblem(*args[:-1])
    out = p.q.new_empty((*p.q.shape[:-1], p.v.shape[-1]))
    lse_shape = (p.q.shape[1], p.q.shape[0]) if p.packed else (p.q.shape[0], p.q.shape[2], p.q.shape[1])
    return out, p.q.new_empty(lse_shape, dtype=_lse_dtype(p.q))


def _attn_bwd(*args):
    n = len(AttentionProblem._fields)
    p = AttentionProblem(*args[:n])
    out, lse, dout, dlse, deterministic, backend = args[n:]
    grads = backends.choose(p, backend).attn_bwd(p, out, lse, dout, dlse, deterministic)
    return tuple(p.q.new_empty(0) if g is None else g for g in grads)


def _attn_bwd_fake(*args):
    p = AttentionProblem(*args[: len(AttentionProblem._fields)])

    def like(t: Tensor | None) -> Tensor:
        return p.q.new_empty(0) if t is None else t.new_empty(t.shape)

    return like(p.q), like(p.k), like(p.v), like(p.bias), like(p.sinks)


_define("attn_fwd", f"({_ATTENTION}, str? backend) -> (Tensor out, Tensor lse)", _attn_fwd, _attn_fwd_fake)
# dbias and dsinks are empty tensors where the problem has no bias or sinks: schemas can't return None.
_define(
    "attn_bwd",
    f"({_ATTENTION}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, bool deterministic, str? backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    _attn_bwd,
    _attn_bwd_fake,
)


# ---- decode ----


def _attn_decode(*args):
    p, backend = DecodeProblem(*args[:-1]), args[-1]
    return backends.choose(p, backend).attn_decode(p)


def _attn_decode_fake(*args):
    p = DecodeProblem(*args[:-1])
    batch, seqlen_q, heads, _ = p.q.shape
    out = p.q.new_empty((batch, seqlen_q, heads, p.v_cache.shape[-1]))
    return out, p.q.new_empty((batch, heads, seqlen_q), dtype=_lse_dtype(p.q))


_define("attn_decode", f"({_DECODE}, str? backend) -> (Tensor out, Tensor lse)", _attn_decode, _attn_decode_fake)


# ---- cross-entropy ----


def _rows(t: Tensor) -> Tensor:
    return t.new_empty((t.shape[0],), dtype=_lse_dtype(t))


def _cross_entropy_fwd(*args):
    p, backend = CrossEntropyProblem(*args[:-1]), args[-1]
    return backends.choose(p, backend).cross_entropy_fwd(p, None, None)


def _cross_entropy_bwd(*args):
    *fields, lse, dloss, dlse, backend = args
    p = CrossEntropyProblem(*fields)
    return backends.choose(p, backend).cross_entropy_bwd(p, lse, dloss, dlse)


def _cross_entropy_fwd_bwd_(*args):
    *fields, dloss, backend = args
    p = CrossEntropyProblem(*fields)
    return backends.choose(p, backend).cross_entropy_fwd(p, dloss, p.logits)


_define(
    "cross_entropy_fwd",
    f"(Tensor logits, {_CE_OPTIONS}, str? backend) -> (Tensor loss, Tensor lse)",
    _cross_entropy_fwd,
    lambda logits, *_: (_rows(logits), _rows(logits)),
)
_define(
    "cross_entropy_bwd",
    f"(Tensor logits, {_CE_OPTIONS}, Tensor lse, Tensor dloss, Tensor? dlse, str? backend) -> Tensor dlogits",
    _cross_entropy_bwd,
    lambda logits, *_: logits.new_empty(logits.shape),
)
# One pass: loss and lse, and the gradient dloss · ∂loss left in the logits' own buffer.
_define(
    "cross_entropy_fwd_bwd_",
    f"(Tensor(a!) logits, {_CE_OPTIONS}, Tensor dloss, str? backend) -> (Tensor loss, Tensor lse)",
    _cross_entropy_fwd_bwd_,
    lambda logits, *_: (_rows(logits), _rows(logits)),
)


# ---- linear cross-entropy ----

_LINEAR_CE = f"Tensor x, Tensor linear_weight, Tensor? linear_bias, {_CE_OPTIONS}"
_LINEAR_FIELDS = len(LinearCrossEntropyProblem._fields)


def _linear_cross_entropy_fwd(*args):
    return chunked_loss.forward(LinearCrossEntropyProblem(*args[:_LINEAR_FIELDS]), *args[_LINEAR_FIELDS:])


def _linear_cross_entropy_bwd(*args):
    return chunked_loss.backward(LinearCrossEntropyProblem(*args[:_LINEAR_FIELDS]), *args[_LINEAR_FIELDS:])


def _linear_cross_entropy_bwd_fake(*args):
    p = LinearCrossEntropyProblem(*args[:_LINEAR_FIELDS])
    dbias = p.x.new_empty(0 if p.linear_bias is None else p.linear_bias.shape, dtype=p.linear_weight.dtype)
    return p.x.new_empty(p.x.shape), p.linear_weight.new_empty(p.linear_weight.shape), dbias


def _linear_cross_entropy_fwd_bwd(*args):
    p = LinearCrossEntropyProblem(*args[:_LINEAR_FIELDS])
    return chunked_loss.forward_backward(p, *args[_LINEAR_FIELDS:])


def _linear_cross_entropy_fwd_bwd_fake(*args):
    p = LinearCrossEntropyProblem(*args[:_LINEAR_FIELDS])
    _, want_dx, want_dw, *_ = args[_LINEAR_FIELDS:]
    fp32 = {"dtype": torch.float32}
    dx = p.x.new_empty(p.x.shape if want_dx else (0,), dtype=chunked_loss.dx_dtype(p.x))
    dw = p.x.new_empty(p.linear_weight.shape if want_dw else (0,), **fp32)
    has_dbias = want_dw and p.linear_bias is not None
    return p.x.new_empty((), **fp32), dx, dw, p.x.new_empty(p.linear_weight.shape[:1] if has_dbias else (0,), **fp32)


_define(
    "linear_cross_entropy_fwd",
    f"({_LINEAR_CE}, int workspace_bytes, str? backend) -> (Tensor loss, Tensor lse)",
    _linear_cross_entropy_fwd,
    lambda x, *_: (x.new_empty(x.shape[:1], dtype=torch.float32), x.new_empty(x.shape[:1], dtype=torch.float32)),
)
_define(
    "linear_cross_entropy_bwd",
    f"({_LINEAR_CE}, Tensor lse, Tensor dloss, Tensor? dlse, int workspace_bytes, str? backend)"
    " -> (Tensor dx, Tensor dw, Tensor dbias)",
    _linear_cross_entropy_bwd,
    _linear_cross_entropy_bwd_fake,
)
# The reduced loss and the gradients that are wanted, in one go; see chunked_loss.forward_backward for their dtypes.
_define(
    "linear_cross_entropy_fwd_bwd",
    f"({_LINEAR_CE}, Tensor scale, bool want_dx, bool want_dw, int workspace_bytes, str? backend)"
    " -> (Tensor loss, Tensor dx, Tensor dw, Tensor dbias)",
    _linear_cross_entropy_fwd_bwd,
    _linear_cross_entropy_fwd_bwd_fake,
)
