"""Attention's backward on Hopper's kernel (wgmma, TMA, sums of dQ by TMA), in the emulator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import emulated
import planted
import public
import pytest
import torch
from emulator.runtime import Library
from test_cuda_attn_bwd import HIDING, WHERE, check_hidden, gradients
from torch import Tensor

import fastattn
from fastattn import backend_cuda
from fastattn.problem import AttentionProblem
from fastattn.testing import (
    CASES,
    CAUSAL,
    Case,
    assert_results_close,
    attention_expected,
    make_problem,
)

pytestmark = pytest.mark.parametrize("emulated_arch", [90], indirect=True)
KERNEL = "attn_bwd_sm90.cuh"


@pytest.fixture(autouse=True)
def loaded(emulated_arch: int) -> None:
    assert backend_cuda.unusable() is None


@pytest.fixture
def emulator(emulated_arch: int) -> Iterator[Library]:
    library = Library(emulated.build())
    library.set_options("without=?")  # lists the places that are passed
    library.passed_places()
    yield library
    library.set_options()


EVERYTHING: dict[str, Any] = {
    "window": (100, 3), "softcap": 10.0, "mask": "b1qk", "bias": "1hqk", "alibi": "bh",
    "sinks": True, "dropout_p": 0.2,
}  # fmt: skip
# Consumers share keys beyond head dim 128: several blocks of keys, of queries and of heads.
WIDE = (
    Case("wide-causal", (1, 130, 140), (1, 1), 256, window=CAUSAL),
    Case("wide-gqa", (1, 70, 70), (2, 1), 160, window=(40, 3)),
    Case("wide-everything", (1, 66, 130), (2, 1), 184, 200, empty_rows=True, **EVERYTHING),
    Case("wide-packed", packed=((65, 70), (3, 5)), heads=(2, 1), head_dim=136, **EVERYTHING),
)


def problem(case: Case) -> AttentionProblem:
    p = make_problem(case, torch.bfloat16)
    return p._replace(seed=public.drawn_seed()) if p.dropout_p > 0 else p


@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=str)
def test_keeps_the_contract(emulated_arch: int, case: Case, poisoned: None) -> None:
    p = problem(case)
    assert_results_close(gradients(p), *attention_expected(p))


ORDERS = (
    "gqa-4-causal", "causal-257", "window-both", "everything", "packed-everything", "wide-causal",
    "wide-packed",
)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in (*CASES, *WIDE) if c.name in ORDERS], ids=str)
def test_whatever_the_order_of_events(emulator: Library, case: Case, poisoned: None) -> None:
    """Deterministic gradients are the same bit for bit: blocks of keys take turns."""
    p = problem(case)
    first = gradients(p)
    for mode in ("eager", "random,seed=1,co_scheduled=1", "random,seed=2,co_scheduled=1"):
        emulator.set_options(mode)
        for name, grad in gradients(p).items():
            assert torch.equal(grad, first[name]), (mode, name)


COARSE = ("gqa-4-causal", "packed-everything", "wide-causal")


@pytest.mark.parametrize("case", [c for c in (*CASES, *WIDE) if c.name in COARSE], ids=str)
def test_with_the_coarsest_arithmetic(emulator: Library, case: Case) -> None:
    p = problem(case)
    emulator.set_options("coarse=1,races=0")
    assert_results_close(gradients(p), *attention_expected(p))


def any_order(p: AttentionProblem, out: Tensor, lse: Tensor) -> list[Tensor]:
    """Gradients of (out · out) / 2, with sums of dQ in any order."""
    return [t for t in backend_cuda.attn_bwd(p, out, lse, out, None, False) if t is not None]


def test_sums_in_any_order(emulator: Library) -> None:
    p = problem(Case("", (1, 150, 300), (2, 1), 64, window=(-1, 0)))
    out, lse = backend_cuda.attn_fwd(p)
    want = any_order(p, out, lse)
    for seed in range(1, 4):
        emulator.set_options(f"random,seed={seed}")
        torch.testing.assert_close(any_order(p, out, lse), want, rtol=2e-2, atol=1e-3)


def is_taken(emulator: Library, p: AttentionProblem) -> bool:
    out, lse = backend_cuda.attn_fwd(p)
    emulator.passed_places()
    any_order(p, out, lse)
    return any(place.startswith(KERNEL) for place in emulator.passed_places())


def test_takes_what_tma_can_copy(emulator: Library) -> None:
    """And the kernels of sm_80 the rest."""
    q, k, v = torch.randn(3, 2, 40, 2, 64).half().unbind()
    assert is_taken(emulator, AttentionProblem(q, k, v))
    assert is_taken(emulator, AttentionProblem(q[..., :61], k[..., :61], v[..., :32]))
    assert not is_taken(emulator, AttentionProblem(q[..., 1:], k[..., 1:], v[..., 1:]))
    assert not is_taken(emulator, AttentionProblem(q, k[:, :0], v[:, :0]))
    wide = torch.randn(1, 40, 2, 136).half()
    assert is_taken(emulator, AttentionProblem(wide, wide, wide))


@pytest.mark.parametrize(("head_dim", "softcap"), [(64, 0.0), (136, 0.0), (136, 9.0)])
def test_every_barrier_is_needed(emulator: Library, head_dim: int, softcap: float) -> None:
    """Of a packed sequence whose tiles aren't full, by heads enough to fill buffers again."""
    lengths_q = torch.tensor([0, 150, 160], dtype=torch.int32)
    lengths_k = torch.tensor([0, 200, 210], dtype=torch.int32)
    q = torch.randn(160, 2, head_dim).half()
    k, v = torch.randn(2, 210, 1, head_dim).half().unbind()
    p = AttentionProblem(q, k, v, cu_seqlens_q=lengths_q, cu_seqlens_k=lengths_k, max_seqlen_q=150,
                         max_seqlen_k=200, scale=0.125, softcap=softcap)  # fmt: skip
    out, lse = backend_cuda.attn_fwd(p)
    assert planted.unnoticed(emulator, lambda: any_order(p, out, lse)) == []


def test_a_packed_neighbour_has_no_influence(emulated_arch: int) -> None:
    """Tiles hold the first rows of the next sequence too: not even NaN passes."""
    lengths = torch.tensor([0, 40, 100], dtype=torch.int32)
    q, k, v = torch.randn(3, 100, 2, 32).half().unbind()
    sequences = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
    p = AttentionProblem(q, k, v, **sequences, max_seqlen_q=60, max_seqlen_k=60)
    out, lse = backend_cuda.attn_fwd(p)
    clean = any_order(p, out, lse)
    for t in (q, k, v, out):
        t[40:] = torch.nan
    lse[:, 40:] = torch.nan
    for got, want in zip(any_order(p, out, lse), clean, strict=True):
        assert torch.equal(got[:40], want[:40]) and got[40:].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", HIDING, ids=str)
def test_hidden_values_reach_no_gradient(
    emulator: Library, case: Case, where: str, value: float
) -> None:
    check_hidden(case, torch.bfloat16, where, value)
    assert any(place.startswith("bwd_steps_sm90.cuh") for place in emulator.passed_places())


def test_autograd_reaches_it(emulator: Library) -> None:
    q, k, v = torch.randn(3, 1, 70, 2, 32).half().unbind()
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = fastattn.attention(*inputs, causal=True, backend="cuda")
    emulator.passed_places()
    out.sum().backward()
    assert any(place.startswith(KERNEL) for place in emulator.passed_places())
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)
