"""What tests and benchmarks of every backend share: the bound on errors, and checks against it.

A backend is right when its largest error against the float64 reference is at most a small factor
times that of textbook code in the inputs' dtype, plus one rounding of its output: the bound comes
from the data, not from a chosen tolerance. Use, for each case of CASES:

    check_attention(backend_attention, make_problem(case, torch.bfloat16))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.special import entr

from . import reference
from .cases import (
    CASES,
    CAUSAL,
    CE_CASES,
    LINEAR_CE_CASES,
    Case,
    CrossEntropyCase,
    make_cross_entropy_problem,
    make_linear_cross_entropy_problem,
    make_problem,
)
from .cases_decode import DECODE_CASES, DecodeCase, make_decode_problem
from .problem import (
    AttentionProblem,
    CrossEntropyProblem,
    DecodeProblem,
    LinearCrossEntropyProblem,
)

__all__ = [
    "CASES",
    "CAUSAL",
    "CE_CASES",
    "DECODE_CASES",
    "LINEAR_CE_CASES",
    "Case",
    "CrossEntropyCase",
    "DecodeCase",
    "assert_close_to_reference",
    "assert_results_close",
    "attention_expected",
    "attention_results",
    "check_attention",
    "check_cross_entropy",
    "check_decode",
    "check_entropy",
    "check_linear_cross_entropy",
    "cross_entropy_expected",
    "cross_entropy_results",
    "decode_results",
    "eager_attention",
    "eager_cross_entropy",
    "eager_decode",
    "eager_linear_cross_entropy",
    "entropy_results",
    "linear_cross_entropy_expected",
    "linear_cross_entropy_results",
    "make_cross_entropy_problem",
    "make_decode_problem",
    "make_linear_cross_entropy_problem",
    "make_problem",
    "random_like",
    "to_float64",
    "whole_matrix",
]

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

Results = dict[str, Tensor]  # by the names of the glossary: out, lse, dq, …
AttentionFunction = Callable[[AttentionProblem], tuple[Tensor, Tensor]]
EntropyFunction = Callable[[AttentionProblem, Tensor], Tensor]
DecodeFunction = Callable[[DecodeProblem], tuple[Tensor, Tensor]]
CrossEntropyFunction = Callable[[CrossEntropyProblem], tuple[Tensor, Tensor]]
LinearCrossEntropyFunction = Callable[[LinearCrossEntropyProblem], tuple[Tensor, Tensor]]
Problem = TypeVar(
    "Problem", AttentionProblem, DecodeProblem, CrossEntropyProblem, LinearCrossEntropyProblem
)


# --- the bound ------------------------------------------------------------------------------------


def assert_close_to_reference(
    ours: Tensor, ref64: Tensor, eager: Tensor, factor: float, name: str = "result"
) -> None:
    """max|ours − ref64| ≤ factor · max|eager − ref64| + one ulp of ours at ref64's magnitude.

    NaN and ±inf must stand exactly where the reference has them. All three have one shape; `eager`
    is textbook code in the inputs' dtype.
    """
    assert ours.shape == ref64.shape, f"{name}: shape {ours.shape}, expected {ref64.shape}"
    info = torch.finfo(ours.dtype)
    ours, ref64, eager = (x.detach().double().cpu() for x in (ours, ref64, eager))
    finite = ref64.isfinite()
    wrong = ~torch.where(finite, ours.isfinite(), (ours == ref64) | (ours.isnan() & ref64.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are finite where the reference"
            f" is not or the reverse; first at {at}: {ours[at]:g}, reference {ref64[at]:g}"
        )
    if not finite.any():
        return
    error = (ours - ref64).abs().where(finite, 0.0)
    eager_error = _max_error(eager, ref64)
    assert eager_error < torch.inf, f"{name}: the eager yardstick is not finite, so gives no bound"
    rounding = info.eps * max(float(ref64[finite].abs().max()), info.smallest_normal)
    bound = factor * eager_error + rounding
    if float(error.max()) > bound:
        at = tuple((error == error.max()).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: max error {error[at]:.3e} is over the bound {bound:.3e} ="
            f" {factor:g} · {eager_error:.3e} (eager) + {rounding:.3e} (rounding);"
            f" worst at {at} of {tuple(error.shape)}: {ours[at]:.9g}, reference {ref64[at]:.9g};"
            f" {int((error > bound).sum())} of {error.numel()} elements are over the bound"
        )


def _max_error(x: Tensor, ref64: Tensor) -> float:
    error = (x.detach().double() - ref64).abs().where(ref64.isfinite(), 0.0)
    return float(error.max()) if error.numel() else 0.0


def assert_results_close(ours: Results, ref64: Results, eager: Results) -> None:
    """`assert_close_to_reference` of every result; names that begin with d are gradients."""
    assert ours.keys() == ref64.keys(), f"got {list(ours)}, expected {list(ref64)}"
    for name in ref64:
        factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
        assert_close_to_reference(ours[name], ref64[name], eager[name], factor, name)


def to_float64(p: Problem) -> Problem:
    """The same problem from the same rounded inputs, in float64 and outside any graph."""
    fields = (
        x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in p
    )
    return type(p)(*fields)  # type: ignore[arg-type]


def random_like(x: Tensor, seed: int) -> Tensor:
    """Normal numbers to send back as the gradient of x: multiples of 1/64, exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(x.shape, generator=generator, device="cpu").mul(64).round().clamp(-255, 255)
    return (steps / 64).to(x.device, x.dtype)


# --- attention ------------------------------------------------------------------------------------


def check_attention(function: AttentionFunction, p: AttentionProblem, seed: int = 1) -> None:
    """Holds function(p) → (out, lse), and its gradients by autograd, to the bound."""
    ours = attention_results(function, p, seed)
    assert ours["out"].dtype == p.q.dtype and ours["lse"].dtype == torch.float32
    assert_results_close(ours, *attention_expected(p, seed))


def attention_results(function: AttentionFunction, p: AttentionProblem, seed: int = 1) -> Results:
    """out, lse, dq, dk, dv and, where p has them, dbias and dsinks, for random dout and dlse."""
    inputs = {name: getattr(p, name) for name in ("q", "k", "v", "bias", "sinks")}
    leaves = {
        name: x.detach().requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)
    }
    out, lse = function(p._replace(**leaves))  # type: ignore[arg-type]
    dout, dlse = random_like(out, seed), random_like(lse, seed + 1)
    grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    names = (f"d{name}" for name in leaves)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}


def attention_expected(p: AttentionProblem, seed: int = 1) -> tuple[Results, Results]:
    """What `attention_results` should be: the float64 reference's, and textbook code's.

    Gradients have two textbooks: autograd through the softmax, and recomputation from the rounded
    out and lse, where dP − delta may not cancel as exactly. The worse of them counts.
    """
    ref64 = attention_results(reference.attention, to_float64(p), seed)
    eager = attention_results(eager_attention, p, seed)
    out, lse = ref64["out"].to(p.q.dtype), ref64["lse"].float()
    dout, dlse = random_like(out, seed), random_like(lse, seed + 1)
    recomputed = reference.attention_backward(p, out, lse, dout, dlse)
    for name, grad in recomputed._asdict().items():
        ref = ref64.get(name)
        if ref is not None and _max_error(grad, ref) > _max_error(eager[name], ref):
            eager[name] = grad
    return ref64, eager


def eager_attention(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """Attention as a textbook has it, every step in q's dtype: the yardstick of rounding errors."""
    if not p.packed:
        return _eager_attention_dense(p)
    outs, lses = [p.q.new_zeros(0, p.q.shape[1], p.v.shape[2])], [p.q.new_zeros(p.q.shape[1], 0)]
    for number, _, _, sequence in reference.packed_sequences(p):
        out, lse = _eager_attention_dense(sequence, number)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def _eager_attention_dense(p: AttentionProblem, first_batch: int = 0) -> tuple[Tensor, Tensor]:
    dtype, group_size = p.q.dtype, p.q.shape[2] // p.k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))  # (B, H, S, D)
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    s = q @ k.mT * p.scale
    if p.softcap > 0:
        s = p.softcap * torch.tanh(s / p.softcap)
    if p.bias is not None:
        s = s + p.bias.to(dtype)
    if p.alibi_slopes is not None:
        distance = reference.diagonal_distance(p).abs()
        s = s - (p.alibi_slopes[..., None, None] * distance).to(dtype)
    visible = reference.visible_keys(p)
    if visible is not None:
        s = s.masked_fill(~visible, -torch.inf)
    seqlen_k = s.shape[-1]
    if p.sinks is not None:
        sinks = p.sinks.to(dtype)[:, None, None].expand(*s.shape[:-1], 1)
        s = torch.cat((s, sinks), dim=-1)
    lse = torch.logsumexp(s, dim=-1)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(s.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    weights = weights[..., :seqlen_k]
    if p.dropout_p > 0:
        weights = weights * reference.dropout_scale(p, weights, first_batch)
    return (weights @ v).transpose(1, 2), lse.masked_fill(empty[..., 0], -torch.inf)


# --- the entropy of attention ---------------------------------------------------------------------


def check_entropy(function: EntropyFunction, p: AttentionProblem) -> None:
    """Holds function(p, lse) → −Σ w · log w, of lse's shape, to float64; w is before dropout.

    Scores and weights are fp32 for inputs of every dtype, so a textbook in bfloat16 would be no
    yardstick. Weights have a relative error of |s| + |lse| times that of fp32, and so has their
    entropy.
    """
    p = p._replace(dropout_p=0.0, seed=None)
    ours = entropy_results(function, p)["entropy"]
    assert ours.dtype == torch.float32
    if p.packed:
        sequences = reference.packed_sequences(p)
        ref64 = torch.cat([entr(whole_matrix(s.problem)).sum(-1)[0] for s in sequences], 1)
    else:
        ref64 = entr(whole_matrix(p)).sum(-1)
    torch.testing.assert_close(
        ours.double(), ref64, rtol=2e-5, atol=2e-5, msg=lambda text: f"entropy: {text}"
    )


def entropy_results(function: EntropyFunction, p: AttentionProblem) -> Results:
    """The entropy of each row, from the float64 reference's lse."""
    return {"entropy": function(p, reference.attention(to_float64(p))[1])}


def whole_matrix(p: AttentionProblem) -> Tensor:
    """A dense problem's weights in float64, (B, H_q, S_q, S_k): attention over the unit vectors."""
    p = to_float64(p)
    batch, seqlen_k, heads_k, _ = p.k.shape
    columns = torch.eye(seqlen_k, dtype=torch.float64, device=p.k.device)[None, :, None]
    v = columns.expand(batch, seqlen_k, heads_k, seqlen_k)
    return reference.attention(p._replace(v=v))[0].transpose(1, 2)


# --- decoding -------------------------------------------------------------------------------------


def check_decode(function: DecodeFunction, p: DecodeProblem) -> None:
    """Holds function(p) → (out, lse), and the cache it appends to, to the bound."""
    ours, eager = decode_results(function, p), decode_results(eager_decode, p)
    ref64 = decode_results(reference.attention_decode, to_float64(p))
    assert ours["out"].dtype == p.q.dtype and ours["lse"].dtype == torch.float32
    assert_results_close(ours, ref64, eager)


def decode_results(function: DecodeFunction, p: DecodeProblem) -> Results:
    """out, lse and the caches after the append; p's own caches stay as they are."""
    p = p._replace(k_cache=p.k_cache.clone(), v_cache=p.v_cache.clone())
    out, lse = function(p)
    return {"out": out, "lse": lse, "k_cache": p.k_cache, "v_cache": p.v_cache}


def eager_decode(p: DecodeProblem) -> tuple[Tensor, Tensor]:
    """The textbook attention over each sequence's keys, gathered from the cache."""
    results = [_eager_attention_dense(sequence) for sequence in reference.decode_sequences(p)]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)


# --- cross-entropy --------------------------------------------------------------------------------


def check_cross_entropy(
    function: CrossEntropyFunction, p: CrossEntropyProblem, seed: int = 1
) -> None:
    """Holds function(p) → (loss, lse), each (N,), and dlogits by autograd, to the bound."""
    ours = cross_entropy_results(function, p, seed)
    assert ours["loss"].dtype == ours["lse"].dtype == torch.float32
    assert_results_close(ours, *cross_entropy_expected(p, seed))


def cross_entropy_results(
    function: CrossEntropyFunction, p: CrossEntropyProblem, seed: int = 1
) -> Results:
    """loss, lse and dlogits, for random gradients of both."""
    logits = p.logits.detach().requires_grad_()
    loss, lse = function(p._replace(logits=logits))
    dloss, dlse = random_like(loss, seed), random_like(lse, seed + 1)
    (dlogits,) = torch.autograd.grad((loss, lse), logits, (dloss, dlse))
    return {"loss": loss.detach(), "lse": lse.detach(), "dlogits": dlogits}


def cross_entropy_expected(p: CrossEntropyProblem, seed: int = 1) -> tuple[Results, Results]:
    """What `cross_entropy_results` should be: the float64 reference's, and textbook code's."""
    ref64 = cross_entropy_results(reference.cross_entropy, to_float64(p), seed)
    return ref64, cross_entropy_results(eager_cross_entropy, p, seed)


def eager_cross_entropy(p: CrossEntropyProblem) -> tuple[Tensor, Tensor]:
    """F.cross_entropy over logits cast to fp32, as training code commonly has it."""
    z = p.logits.float()
    if p.softcap > 0:
        z = p.softcap * torch.tanh(z / p.softcap)
    loss = F.cross_entropy(
        z,
        p.target,
        p.weight,
        ignore_index=p.ignore_index,
        reduction="none",
        label_smoothing=p.label_smoothing,
    )
    lse = torch.logsumexp(z, dim=-1)
    z_loss = (p.z_loss * lse.square()).masked_fill(p.target == p.ignore_index, 0.0)
    return loss + z_loss, lse


# --- linear cross-entropy -------------------------------------------------------------------------


def check_linear_cross_entropy(
    function: LinearCrossEntropyFunction, p: LinearCrossEntropyProblem, seed: int = 1
) -> None:
    """Holds function(p) → (loss, lse), each (N,), and its gradients by autograd, to the bound."""
    ours = linear_cross_entropy_results(function, p, seed)
    assert ours["loss"].dtype == ours["lse"].dtype == torch.float32
    assert_results_close(ours, *linear_cross_entropy_expected(p, seed))


def linear_cross_entropy_results(
    function: LinearCrossEntropyFunction, p: LinearCrossEntropyProblem, seed: int = 1
) -> Results:
    """loss, lse, dx, dlinear_weight and, where p has it, dlinear_bias, for random gradients."""
    inputs = {name: getattr(p, name) for name in ("x", "linear_weight", "linear_bias")}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    loss, lse = function(p._replace(**leaves))
    dloss, dlse = random_like(loss, seed), random_like(lse, seed + 1)
    grads = torch.autograd.grad((loss, lse), list(leaves.values()), (dloss, dlse))
    names = (f"d{name}" for name in leaves)
    return {"loss": loss.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}


def linear_cross_entropy_expected(
    p: LinearCrossEntropyProblem, seed: int = 1
) -> tuple[Results, Results]:
    """What `linear_cross_entropy_results` should be: in float64, and in the inputs' dtype."""
    ref64 = linear_cross_entropy_results(eager_linear_cross_entropy, to_float64(p), seed)
    return ref64, linear_cross_entropy_results(eager_linear_cross_entropy, p, seed)


def eager_linear_cross_entropy(p: LinearCrossEntropyProblem) -> tuple[Tensor, Tensor]:
    """A linear layer in the inputs' dtype, then the cross-entropy of its logits."""
    logits = F.linear(p.x, p.linear_weight, p.linear_bias)
    function = reference.cross_entropy if logits.dtype == torch.float64 else eager_cross_entropy
    return function(CrossEntropyProblem(logits, *p[3:]))
