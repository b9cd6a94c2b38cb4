"""The specification of attention against a second formula, PyTorch's own and gradcheck."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import philox, reference
from fastattn.problem import AttentionProblem, DecodeProblem
from fastattn.testing import (
    CASES,
    CAUSAL,
    DECODE_CASES,
    Case,
    DecodeCase,
    attention_results,
    check_attention,
    check_decode,
    decode_results,
    make_decode_problem,
    make_problem,
    random_like,
    to_float64,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"rtol": 1e-10, "atol": 1e-12}


def randn64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# --- attention: a second formula ------------------------------------------------------------------


def attention_by_rows(p: AttentionProblem) -> tuple[Tensor, Tensor]:
    """The contract a row at a time, in float64 numpy: no masks, only the keys a query sees."""
    if p.packed:
        pieces = [attention_by_rows_of(s.problem, s.number) for s in reference.packed_sequences(p)]
        return torch.cat([out[0] for out, _ in pieces]), torch.cat([x[0] for _, x in pieces], 1)
    return attention_by_rows_of(p, 0)


def attention_by_rows_of(p: AttentionProblem, first_batch: int) -> tuple[Tensor, Tensor]:
    q, k, v = p.q.numpy(), p.k.numpy(), p.v.numpy()
    batch, seqlen_q, heads, _ = q.shape
    seqlen_k, group_size = k.shape[1], heads // k.shape[2]
    full = (batch, heads, seqlen_q, seqlen_k)
    mask = np.ones(full, bool) if p.mask is None else p.mask.expand(full).numpy()
    bias = np.zeros(full) if p.bias is None else p.bias.expand(full).numpy()
    slopes = np.zeros((batch, heads))
    if p.alibi_slopes is not None:
        slopes = p.alibi_slopes.expand(batch, heads).numpy()
    keep = np.ones(full)
    if p.dropout_p > 0:
        kept = philox.keep_mask(p.seed, p.dropout_p, *full, first_batch=first_batch)
        keep = kept.numpy() / (1 - p.dropout_p)
    out = np.zeros((batch, seqlen_q, heads, v.shape[-1]))
    lse = np.full((batch, heads, seqlen_q), -np.inf)
    for b, h, i in np.ndindex(batch, heads, seqlen_q):
        position = i + seqlen_k - seqlen_q
        first = 0 if p.window_left < 0 else max(0, position - p.window_left)
        end = seqlen_k if p.window_right < 0 else min(seqlen_k, position + p.window_right + 1)
        seen = np.array([j for j in range(first, end) if mask[b, h, i, j]], dtype=int)
        s = p.scale * (k[b, seen, h // group_size] @ q[b, i, h])
        if p.softcap > 0:
            s = p.softcap * np.tanh(s / p.softcap)
        s = s + bias[b, h, i, seen] - slopes[b, h] * np.abs(position - seen)
        logits = s if p.sinks is None else np.append(s, p.sinks[h].item())
        if len(logits) == 0:
            continue
        lse[b, h, i] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        weights = np.exp(s - lse[b, h, i]) * keep[b, h, i, seen]
        out[b, i, h] = weights @ v[b, seen, h // group_size]
    return torch.from_numpy(out), torch.from_numpy(lse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_contract_row_by_row(case: Case) -> None:
    p = make_problem(case, torch.float64)
    out, lse = reference.attention(p)
    expected_out, expected_lse = attention_by_rows(p)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected_out, **SMALL)
    torch.testing.assert_close(lse, expected_lse, **SMALL)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_backward_is_autograd(case: Case) -> None:
    p = to_float64(make_problem(case, torch.float64))  # sinks too: its gradient to the last digit
    expected = attention_results(reference.attention, p)
    out, lse = expected["out"], expected["lse"]
    dout, dlse = random_like(out, 1), random_like(lse, 2)
    grads = reference.attention_backward(p, out, lse, dout, dlse)
    inputs = {"dq": p.q, "dk": p.k, "dv": p.v, "dbias": p.bias, "dsinks": p.sinks}
    for name, grad in grads._asdict().items():
        if inputs[name] is None:
            assert grad is None
        else:
            assert grad.dtype == inputs[name].dtype and grad.isfinite().all()
            torch.testing.assert_close(grad, expected[name], **SMALL)

    without_dlse = reference.attention_backward(p, out, lse, dout)
    zero_dlse = reference.attention_backward(p, out, lse, dout, torch.zeros_like(dlse))
    for a, b in zip(without_dlse, zero_dlse, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_in_low_precision_keeps_the_bound(case: Case, dtype: torch.dtype) -> None:
    check_attention(reference.attention, make_problem(case, dtype, seed=2))


# --- attention: PyTorch's own ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", ["plain", "causal", "mask", "bias", "gqa", "scale", "dims"])
def test_attention_is_sdpa(variant: str, dtype: torch.dtype) -> None:
    heads_k = 2 if variant == "gqa" else 4
    dim_v = 24 if variant == "dims" else 16
    q = torch.randn(2, 4, 33, 16, dtype=dtype)
    k, v = torch.randn(2, heads_k, 33, 16, dtype=dtype), torch.randn(2, heads_k, 33, dim_v).to(q)
    mask = torch.rand(2, 1, 33, 33) < 0.7 if variant == "mask" else None
    bias = torch.randn(1, 4, 33, 33).to(q) if variant == "bias" else None
    scale = 0.7 if variant == "scale" else 0.25
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask if mask is not None else bias,
            is_causal=variant == "causal",
            scale=scale,
            enable_gqa=variant == "gqa",
        )
    bshd = (x.transpose(1, 2) for x in (q, k, v))
    right = 0 if variant == "causal" else -1
    out, _ = reference.attention(
        AttentionProblem(*bshd, mask=mask, bias=bias, window_right=right, scale=scale)
    )
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_attention_agrees_with_sdpa_on_rows_that_see_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    p = AttentionProblem(*(x.transpose(1, 2) for x in (q, k, v)), mask=mask[None, None])
    out, lse = reference.attention(p._replace(scale=8**-0.5))
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert (lse[..., 2] == -torch.inf).all() and lse[..., :2].isfinite().all()


# --- attention: derivatives -----------------------------------------------------------------------

TINY = {"shape": (1, 3, 4), "heads": (2, 1), "head_dim": 3, "head_dim_v": 2}
DERIVATIVE_CASES = [
    Case("plain", **TINY),
    Case("causal", (1, 4, 3), (2, 1), 3, window=CAUSAL),  # its first row sees nothing
    Case("window", **TINY, window=(1, 0)),
    Case("softcap", **TINY, softcap=1.5),
    Case("mask", **TINY, mask="bhqk", empty_rows=True),
    Case("bias", **TINY, bias="1hq1"),
    Case("alibi", **TINY, alibi="bh"),
    Case("sinks", **TINY, sinks=True),
    Case("sinks-empty", **TINY, mask="11qk", empty_rows=True, sinks=True),
    Case("dropout", **TINY, dropout_p=0.4),
    Case("packed", heads=(2, 1), head_dim=2, packed=((2, 3), (0, 1), (2, 0)), bias="b11k"),
    Case("everything", **TINY, window=(3, 2), softcap=2.0, bias="11qk", sinks=True, dropout_p=0.3),
]


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_attention_is_twice_differentiable(case: Case) -> None:
    p = to_float64(make_problem(case, torch.float64))
    names = [name for name in ("q", "k", "v", "bias", "sinks") if getattr(p, name) is not None]
    leaves = [getattr(p, name).detach().requires_grad_() for name in names]

    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference.attention(p._replace(**dict(zip(names, inputs, strict=True))))
        return out, lse.masked_fill(lse == -torch.inf, 0.0)  # −inf has no finite difference

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_attention_backward_is_differentiable() -> None:
    p = make_problem(Case("tiny", **TINY, window=CAUSAL), torch.float64)

    def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        problem = p._replace(q=q, k=k, v=v)
        return reference.attention_backward(problem, *reference.attention(problem), dout)[:3]

    dout = randn64(1, 3, 2, 2)
    assert gradcheck(gradients, [x.detach().requires_grad_() for x in (p.q, p.k, p.v, dout)])


# --- attention: hard cases ------------------------------------------------------------------------


def test_rows_that_see_nothing_are_zero_and_have_zero_gradients() -> None:
    p = make_problem(Case("causal", (2, 9, 4), (2, 2), 8, window=CAUSAL), torch.float32)
    results = attention_results(reference.attention, p)
    assert (results["out"][:, :5] == 0).all() and (results["lse"][..., :5] == -torch.inf).all()
    assert (results["dq"][:, :5] == 0).all() and results["dq"][:, 5:].abs().min() > 0
    for name in ("out", "dq", "dk", "dv"):
        assert results[name].isfinite().all()


def test_a_bias_of_minus_infinity_hides_like_a_mask() -> None:
    masked = make_problem(Case("m", (1, 6, 7), mask="11qk", empty_rows=True), torch.float64)
    bias = torch.zeros(1, 1, 6, 7, dtype=torch.float64).masked_fill(~masked.mask, -torch.inf)
    expected = attention_results(reference.attention, masked)
    got = attention_results(reference.attention, masked._replace(mask=None, bias=bias))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **SMALL)
    assert got["dbias"].isfinite().all() and (got["dbias"][~masked.mask] == 0).all()


def test_a_sink_alone_gives_its_logit_as_lse() -> None:
    p = make_problem(Case("s", (2, 3, 0), (2, 2), 4, sinks=True), torch.float64)
    results = attention_results(reference.attention, p)
    assert (results["out"] == 0).all()
    torch.testing.assert_close(results["lse"], p.sinks.double()[None, :, None].expand(2, 2, 3))
    expected = random_like(results["lse"], 2).sum((0, 2)).float()
    torch.testing.assert_close(results["dsinks"], expected)


def test_a_sink_of_minus_infinity_is_no_sink() -> None:
    p = make_problem(Case("c", (1, 5, 3), (2, 2), 4, window=CAUSAL), torch.float64)
    sinks = torch.full((2,), -torch.inf, dtype=torch.float64)
    expected = attention_results(reference.attention, p)
    got = attention_results(reference.attention, p._replace(sinks=sinks))
    assert (got.pop("dsinks") == 0).all()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **SMALL)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", ["causal", "mask"])
def test_what_is_hidden_does_not_leak(case: str, value: float) -> None:
    """Rows that see a poisoned key are as eager's; the others and their gradients stay clean."""
    seqlen, bad = 6, 3
    visible = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    if case == "mask":
        visible = torch.rand(seqlen, seqlen) < 0.6
        visible[:, bad] = torch.arange(seqlen) % 2 == 0
    q, k, v = (randn64(1, seqlen, 1, 4) for _ in range(3))
    p = AttentionProblem(q, k, v, mask=visible[None, None])
    if case == "causal":
        p = p._replace(mask=None, window_right=0)
    sees = visible[:, bad]
    clean = reference.attention(p)

    k_bad, v_bad = k.clone(), v.clone()
    k_bad[:, bad, :, 1] = value
    v_bad[:, bad, :, 1] = value
    with_v, with_k = p._replace(v=v_bad), p._replace(k=k_bad)
    out, lse = reference.attention(with_v)
    torch.testing.assert_close(lse, clean[1], **SMALL)
    torch.testing.assert_close(out[:, ~sees], clean[0][:, ~sees], **SMALL)
    # The plain product where the key is seen: the poisoned column alone is not finite.
    assert out[:, sees][..., [0, 2, 3]].isfinite().all()
    assert torch.equal(
        out[:, sees, :, 1].isnan(), torch.full((1, int(sees.sum()), 1), math.isnan(value))
    )
    assert not out[:, sees, :, 1].isfinite().any()

    out, lse = reference.attention(with_k)
    torch.testing.assert_close(out[:, ~sees], clean[0][:, ~sees], **SMALL)
    scores = (q[0, :, 0] @ k_bad[0, :, 0].T).masked_fill(~visible, -torch.inf)
    eager_nan = torch.softmax(scores, -1).isnan().any(-1)
    assert torch.equal(out[0, :, 0].isnan().all(-1)[sees], eager_nan[sees])

    dout = randn64(1, seqlen, 1, 4)
    dout[:, sees] = 0  # the loss looks at the clean rows alone
    expected = reference.attention_backward(p, *clean, dout)
    for poisoned in (with_v, with_k):
        by_hand = reference.attention_backward(poisoned, *reference.attention(poisoned), dout)
        q_leaf = q.clone().requires_grad_()
        out, _ = reference.attention(poisoned._replace(q=q_leaf))
        (by_autograd,) = torch.autograd.grad(out, q_leaf, dout)
        for dq in (by_hand.dq, by_autograd):
            torch.testing.assert_close(dq[:, ~sees], expected.dq[:, ~sees], **SMALL)


def test_nan_queries_poison_their_row_alone() -> None:
    q, k, v = (randn64(1, 5, 2, 4) for _ in range(3))
    clean_out, _ = reference.attention(AttentionProblem(q, k, v))
    q[0, 2, 1, 0] = torch.nan
    out, lse = reference.attention(AttentionProblem(q, k, v))
    bad = torch.zeros(1, 5, 2, dtype=torch.bool)
    bad[0, 2, 1] = True
    assert torch.equal(out.isnan(), bad[..., None].expand_as(out))
    assert torch.equal(lse.isnan(), bad.transpose(1, 2))
    assert torch.equal(out[~bad], clean_out[~bad])


def test_tokens_behind_the_last_sequence_are_zero() -> None:
    p = make_problem(Case("p", heads=(2, 2), packed=((3, 4), (2, 2))), torch.float32)
    longer = p._replace(q=torch.cat((p.q, p.q.new_full((2, 2, 16), torch.nan))))
    out, lse = reference.attention(longer)
    expected_out, expected_lse = reference.attention(p)
    assert torch.equal(out[:5], expected_out) and torch.equal(lse[:, :5], expected_lse)
    assert (out[5:] == 0).all() and (lse[:, 5:] == -torch.inf).all()
    grads = reference.attention_backward(longer, out, lse, torch.ones_like(out))
    assert (grads.dq[5:] == 0).all() and grads.dq[:5].isfinite().all()


def test_packed_sequences_are_the_dense_ones() -> None:
    p = make_problem(Case("p", (3, 9, 9), (4, 2), dropout_p=0.3, window=CAUSAL), torch.float64)
    out, lse = reference.attention(p)
    offsets = torch.arange(0, 28, 9, dtype=torch.int32)
    packed = p._replace(
        q=p.q.flatten(0, 1),
        k=p.k.flatten(0, 1),
        v=p.v.flatten(0, 1),
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=9,
        max_seqlen_k=9,
    )
    packed_out, packed_lse = reference.attention(packed)
    torch.testing.assert_close(packed_out, out.flatten(0, 1), **SMALL)
    torch.testing.assert_close(packed_lse, lse.transpose(0, 1).flatten(1), **SMALL)


def test_dropout_keeps_lse_and_mean() -> None:
    p = make_problem(Case("d", (1, 8, 16), dropout_p=0.25), torch.float64)
    plain_out, plain_lse = reference.attention(p._replace(dropout_p=0.0, seed=None))
    samples = 400  # the batch is part of the counter: as many draws as entries
    q, k, v = (x.expand(samples, -1, -1, -1) for x in (p.q, p.k, p.v))
    outs, lses = reference.attention(p._replace(q=q, k=k, v=v))
    torch.testing.assert_close(lses, plain_lse.expand_as(lses), **SMALL)
    error = (outs.mean(0) - plain_out[0]).abs() / (outs.std(0) / samples**0.5)
    assert error.max() < 5  # in standard deviations of the mean
    assert (reference.attention(p._replace(dropout_p=1.0))[0] == 0).all()


def test_low_precision_is_computed_in_fp32_and_rounded_once() -> None:
    p = make_problem(Case("x", (2, 33, 33), (4, 2), window=CAUSAL), torch.bfloat16)
    out, lse = reference.attention(p)
    wide = p._replace(q=p.q.float(), k=p.k.float(), v=p.v.float())
    wide_out, wide_lse = reference.attention(wide)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, wide_out.bfloat16()) and torch.equal(lse, wide_lse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast_out, cast_lse = reference.attention(wide)
    assert torch.equal(cast_out, wide_out) and torch.equal(cast_lse, wide_lse)


# --- decoding -------------------------------------------------------------------------------------


def decode_by_hand(p: DecodeProblem, case: DecodeCase) -> tuple[Tensor, Tensor]:
    """Sequence by sequence on contiguous keys; rotary as a product of complex numbers."""

    def rotate(x: Tensor, position: int) -> Tensor:  # (H, D)
        if p.rotary_cos is None:
            return x
        half = case.rotary_dim // 2
        turn = torch.complex(p.rotary_cos[position].double(), p.rotary_sin[position].double())
        x = x.clone()
        first, second = slice(0, half), slice(half, 2 * half)
        if p.rotary_interleaved:
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        turned = torch.complex(x[:, first], x[:, second]) * turn
        x[:, first], x[:, second] = turned.real, turned.imag
        return x

    outs, lses = [], []
    for b, length in enumerate(case.lengths):
        if case.page_size:
            pages = [int(page) for page in p.block_table[b] if page >= 0]
            k_old, v_old = (c[pages].flatten(0, 1)[:length] for c in (p.k_cache, p.v_cache))
        else:
            row = case.batch_idx[b] if case.batch_idx else b
            k_old, v_old = p.k_cache[row, :length], p.v_cache[row, :length]
        k, v = k_old, v_old
        for t in range(case.seqlen_new):
            k = torch.cat((k, rotate(p.k[b, t], length + t)[None]))
            v = torch.cat((v, p.v[b, t][None]))
        windowed = case.window != (-1, -1)
        q = torch.stack(
            [rotate(p.q[b, t], length + (t if windowed else 0)) for t in range(case.seqlen_q)]
        )[None]
        start = case.leftpad[b] if case.leftpad else 0
        slopes = p.alibi_slopes
        out, lse = attention_by_rows(
            AttentionProblem(
                q,
                k[None, start:],
                v[None, start:],
                alibi_slopes=slopes[b : b + 1] if case.alibi == "bh" else slopes,
                sinks=p.sinks,
                window_left=p.window_left,
                window_right=p.window_right,
                scale=p.scale,
                softcap=p.softcap,
            )
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode_by_hand(case: DecodeCase) -> None:
    p = make_decode_problem(case, torch.float64)
    expected_out, expected_lse = decode_by_hand(p, case)
    results = decode_results(reference.attention_decode, p)
    torch.testing.assert_close(results["out"], expected_out, **SMALL)
    torch.testing.assert_close(results["lse"], expected_lse, **SMALL)
    if case.seqlen_new:
        unused = p.v_cache.isnan().all(-1).all(-1)  # positions that hold no key
        written = unused & ~results["v_cache"].isnan().all(-1).all(-1)
        assert int(written.sum()) == case.seqlen_new * len(case.lengths)
        for name, before in (("k_cache", p.k_cache), ("v_cache", p.v_cache)):
            same = (results[name] == before) | (results[name].isnan() & before.isnan())
            assert same[~written].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decode_in_low_precision_keeps_the_bound(case: DecodeCase, dtype: torch.dtype) -> None:
    check_decode(reference.attention_decode, make_decode_problem(case, dtype))


def test_decoding_step_by_step_is_causal_attention() -> None:
    seqlen = 9
    q, k, v = randn64(2, seqlen, 4, 8), randn64(2, seqlen, 2, 8), randn64(2, seqlen, 2, 8)
    expected, _ = reference.attention(AttentionProblem(q, k, v, window_right=0))
    p = DecodeProblem(q, torch.zeros_like(k), torch.zeros_like(v), torch.zeros(2), window_right=0)
    outs, start = [], 0
    for step in (4, 1, 1, 3):
        now = slice(start, start + step)
        lengths = torch.full((2,), start, dtype=torch.int32)
        outs.append(
            reference.attention_decode(
                p._replace(q=q[:, now], k=k[:, now], v=v[:, now], cache_seqlens=lengths)
            )[0]
        )
        start += step
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, **SMALL)
    assert torch.equal(p.k_cache, k) and torch.equal(p.v_cache, v)
