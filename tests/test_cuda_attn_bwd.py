"""Attention's backward on the emulator: the shared grid, orders of events, and determinism."""

from __future__ import annotations

import math

import emulated
import public
import pytest
import torch
from emulator.runtime import Library
from torch import Tensor

from fastattn import backend_cuda, reference
from fastattn.problem import AttentionProblem
from fastattn.testing import (
    CASES,
    Case,
    Results,
    assert_results_close,
    attention_expected,
    make_problem,
    random_like,
    to_float64,
)

DTYPES = {75: (torch.float16, torch.float32), 80: (torch.float16, torch.bfloat16)}


def gradients(p: AttentionProblem) -> Results:
    """What fastattn.testing.attention_results gives, by the kernels themselves."""
    out, lse = backend_cuda.attn_fwd(p)
    dout, dlse = random_like(out, 1), random_like(lse, 2)
    values = backend_cuda.attn_bwd(p, out, lse, dout, dlse, True)
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    grads = {n: x for n, x in zip(names, values, strict=True) if isinstance(x, Tensor)}
    return {"out": out, "lse": lse, **grads}


@pytest.mark.slow  # tests/test_attention.py does most of it by the public functions
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_the_contract(emulated_arch: int, case: Case, index: int, poisoned: None) -> None:
    p = make_problem(case, DTYPES[emulated_arch][index])
    if p.dropout_p > 0:
        p = p._replace(seed=public.drawn_seed())
    assert_results_close(gradients(p), *attention_expected(p))


ORDERS = ("gqa-4-causal", "dims-192-128", "window-both", "everything", "packed-everything")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ORDERS], ids=str)
def test_whatever_the_order_of_events(emulated_arch: int, case: Case, poisoned: None) -> None:
    """Gradients are the same bit for bit."""
    library = Library(emulated.build())
    p = make_problem(case, torch.float16)
    first = gradients(p)
    try:
        for mode in ("eager", "random,seed=1", "random,seed=2"):
            library.set_options(mode)
            for name, grad in gradients(p).items():
                assert torch.equal(grad, first[name]), (mode, name)
    finally:
        library.set_options()


COARSE = {75: ("causal-257", "packed-everything"), 80: ("softcap-causal", "sinks")}


def test_with_the_coarsest_arithmetic(emulated_arch: int) -> None:
    """A GPU's approximations and sums are nearer to exact than the option has them."""
    library = Library(emulated.build())
    for case in (case for case in CASES if case.name in COARSE[emulated_arch]):
        for dtype in DTYPES[emulated_arch]:
            p = make_problem(case, dtype)
            if p.dropout_p > 0:
                p = p._replace(seed=public.drawn_seed())
            try:
                library.set_options("coarse=1,races=0")
                ours = gradients(p)
            finally:
                library.set_options()
            assert_results_close(ours, *attention_expected(p))


def test_deterministic_gradient_of_a_shared_bias(emulated_arch: int) -> None:
    q = torch.randn(2, 5, 2, 8, dtype=torch.float16)
    p = AttentionProblem(q, q, q, bias=torch.randn(1, 2, 1, 5, dtype=torch.float16))
    out, lse = backend_cuda.attn_fwd(p)
    expected, ours = (backend_cuda.attn_bwd(p, out, lse, out, None, d)[3] for d in (False, True))
    assert ours is not None and ours.shape == (1, 2, 1, 5) and ours.dtype == torch.float16
    torch.testing.assert_close(ours, expected)


HIDING = (
    Case("causal", (1, 65, 65), (2, 1), 16, window=(-1, 0)),
    Case("window", (1, 37, 71), (2, 2), 72, 40, window=(20, 3)),
    Case("mask", (1, 40, 70), (1, 1), 24, mask="11qk", dropout_p=0.3),
    Case("packed", packed=((5, 7), (40, 30)), heads=(2, 1), head_dim=136, window=(5, 0)),
)


WHERE = ("q", "k", "v", "dout")


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", HIDING, ids=str)
def test_hidden_values_reach_no_gradient(
    emulated_arch: int, case: Case, where: str, value: float
) -> None:
    check_hidden(case, DTYPES[emulated_arch][case.name == "window"], where, value)


def check_hidden(case: Case, dtype: torch.dtype, where: str, value: float) -> None:
    """Gradients are numbers wherever the specification says so, and the right ones."""
    p = make_problem(case, dtype)
    if p.dropout_p > 0:
        p = p._replace(seed=public.drawn_seed())
    clean = p.q.new_zeros(*p.q.shape[:-1], p.v.shape[-1])
    tensors = {"q": p.q, "k": p.k, "v": p.v, "dout": random_like(clean, 1)}
    tensors[where][..., 20, -1, 3] = value
    p = p._replace(**{name: tensors[name] for name in "qkv"})
    out, lse = backend_cuda.attn_fwd(p)
    ours = backend_cuda.attn_bwd(p, out, lse, tensors["dout"], None, True)
    wide = (t.double() for t in (out, lse, tensors["dout"]))
    exact = reference.attention_backward(to_float64(p), *wide)
    assert not all(grad64.isfinite().all() for grad64 in exact[:3])
    for grad, grad64 in zip(ours[:3], exact[:3], strict=True):
        finite = grad64.isfinite()
        torch.testing.assert_close(grad.double()[finite], grad64[finite], rtol=2e-2, atol=1e-2)
