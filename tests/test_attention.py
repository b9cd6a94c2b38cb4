"""Every backend's attention through the public functions, against the contract."""

from __future__ import annotations

import math

import cpu_isa
import public
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import backends, reference
from fastattn.problem import AttentionProblem
from fastattn.testing import (
    CASES,
    Case,
    Results,
    assert_results_close,
    attention_expected,
    attention_results,
    make_problem,
    random_like,
    to_float64,
)

pytestmark = pytest.mark.emulated

# --- the shared grid ------------------------------------------------------------------------------

_expected: dict[tuple[str, torch.dtype], tuple[Results, Results]] = {}


def problem_of(case: Case, dtype: torch.dtype) -> AttentionProblem:
    p = make_problem(case, dtype)
    return p._replace(seed=public.drawn_seed()) if p.dropout_p > 0 else p


def expected_of(case: Case, dtype: torch.dtype) -> tuple[Results, Results]:
    """Computed once for all backends."""
    key = (case.name, dtype)
    if key not in _expected:
        _expected[key] = attention_expected(problem_of(case, dtype))
    return _expected[key]


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=public.name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_the_contract(backend: str, case: Case, dtype: torch.dtype, poisoned: None) -> None:
    ours = attention_results(public.attention_on(backend), problem_of(case, dtype))
    assert ours["out"].dtype == dtype and ours["lse"].dtype == torch.float32
    assert ours["out"].is_contiguous()
    assert_results_close(ours, *expected_of(case, dtype))


LONG = (
    Case("causal-700", (1, 700, 700), (2, 2), 64, window=(-1, 0)),
    Case("gqa-sinks-300-900", (2, 300, 900), (4, 1), 32, sinks=True),
    Case("packed-bias", heads=(2, 1), packed=((400, 400), (3, 260)), bias="1hqk", bias_fp32=True),
    Case("dropout-1000", (1, 130, 1000), (2, 1), 40, dropout_p=0.2, softcap=9.0),
)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sequences_on_any_number_of_threads(
    backend: str, case: Case, threads: int, poisoned: None
) -> None:
    """Work is cut up by the number of threads, and the pieces' gradients are added."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = attention_results(public.attention_on(backend), problem_of(case, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert_results_close(ours, *expected_of(case, torch.bfloat16))


@pytest.mark.parametrize("isa", cpu_isa.others())
def test_every_instruction_set_keeps_the_contract(isa: str) -> None:
    cpu_isa.run_file(__file__, isa, "(test_keeps or test_long) and cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_the_reference_itself(case: Case) -> None:
    p = to_float64(problem_of(case, torch.float32))
    ours = attention_results(public.attention, p)
    for name, expected in attention_results(reference.attention, p).items():
        assert ours[name].dtype == torch.float64
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)], ids=str)
def test_nothing_to_do(backend: str, sizes: tuple[int, int, int], poisoned: None) -> None:
    """Also with the stride-0 gradients that sum() sends back."""
    batch, seqlen_q, seqlen_k = sizes
    q = torch.randn(batch, seqlen_q, 2, 8, requires_grad=True)
    k = torch.randn(batch, seqlen_k, 2, 8, requires_grad=True)
    out, lse = fastattn.attention(q, k, k, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == (batch, 2, seqlen_q)
    assert not out.any() and (lse == -torch.inf).all()
    (out.sum() + lse.sum()).backward()
    assert not q.grad.any() and not k.grad.any()


# --- gradients ------------------------------------------------------------------------------------

TINY = Case("tiny", (2, 7, 9), (4, 2), 8, bias="1hqk", sinks=True, window=(-1, 0))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks"])
def test_gradient_of_one_input_only(backend: str, wanted: str) -> None:
    p = make_problem(TINY, torch.float32)
    whole = attention_results(public.attention_on(backend), p)
    leaf = getattr(p, wanted).clone().requires_grad_()
    out, lse = public.attention(p._replace(**{wanted: leaf}), backend)
    used = [x for x in (out, lse) if x.requires_grad]  # the reference's lse does not depend on v
    torch.autograd.backward(used, [random_like(out, 1), random_like(lse, 2)][: len(used)])
    assert torch.equal(leaf.grad, whole[f"d{wanted}"])


@pytest.mark.parametrize("use", ["out", "lse"])
def test_gradient_of_one_output_only(backend: str, use: str) -> None:
    """The other output's gradient is then None; and sum() sends a gradient of stride 0."""
    p = make_problem(TINY, torch.float32)
    q = p.q.clone().requires_grad_()
    out, lse = public.attention(p._replace(q=q), backend)
    (out if use == "out" else lse).sum().backward()
    q64 = p.q.double().requires_grad_()
    out, lse = reference.attention(to_float64(p)._replace(q=q64))
    (out if use == "out" else lse).sum().backward()
    torch.testing.assert_close(q.grad.double(), q64.grad, rtol=1e-5, atol=1e-6)


def test_upstream_gradients_of_any_strides(backend: str) -> None:
    p = make_problem(TINY, torch.float32)
    q = p.q.clone().requires_grad_()
    out, lse = public.attention(p._replace(q=q), backend)
    dout, dlse = random_like(out, 1), random_like(lse, 2)
    (plain,) = torch.autograd.grad((out, lse), q, (dout, dlse), retain_graph=True)
    strange = (dout.mT.contiguous().mT, dlse.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    assert strange[0].stride(-1) != 1 and strange[1].stride(-1) != 1
    (same,) = torch.autograd.grad((out, lse), q, strange)
    assert torch.equal(same, plain)


def test_backward_twice_through_a_retained_graph(backend: str) -> None:
    p = make_problem(TINY, torch.float32)
    q = p.q.clone().requires_grad_()
    out, _ = public.attention(p._replace(q=q), backend)
    (first,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    (second,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(first, second)


def test_second_backward_names_the_backend_that_has_one(backend: str) -> None:
    q = torch.randn(1, 3, 2, 4, requires_grad=True)
    (dq,) = torch.autograd.grad(
        fastattn.attention(q, q, q, backend=backend).square().sum(), q, create_graph=True
    )
    if backend == "reference":
        dq.sum().backward()
        assert q.grad.abs().sum() > 0
    else:
        with pytest.raises(RuntimeError, match="backend='reference'"):
            dq.sum().backward()


def test_reference_is_twice_differentiable() -> None:
    q, k, v = (torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor):
        return fastattn.attention(
            q, k, v, bias=bias, causal=True, softcap=3.0, return_lse=True, backend="reference"
        )

    assert torch.autograd.gradgradcheck(f, (q, k, v, bias))


def test_no_gradient_flows_to_alibi_slopes(backend: str) -> None:
    q = torch.randn(1, 3, 2, 4, requires_grad=True)
    slopes = torch.ones(2, requires_grad=True)
    fastattn.attention(q, q, q, alibi_slopes=slopes, backend=backend).sum().backward()
    assert slopes.grad is None


@pytest.mark.parametrize("case", [c for c in CASES if "everything" in c.name], ids=str)
def test_the_same_bits_every_time(backend: str, case: Case) -> None:
    p = problem_of(case, torch.float32)
    first, second = (attention_results(public.attention_on(backend), p) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# --- memory ---------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts what copies a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in ("clone", "_to_copy", "copy_", "contiguous"):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strides", ["qkv", "bhsd", "padded", "expanded"])
def test_strides_are_taken_without_a_copy(strides: str) -> None:
    p = make_problem(Case("", (2, 9, 9), (2, 2), 8, strides=strides), torch.bfloat16)
    with Copies() as copies:
        public.attention(p, "cpu")
    assert copies.seen == []


def test_a_last_dimension_of_other_stride_is_copied(backend: str) -> None:
    q, k, v = (torch.randn(2, 8, 3, 5).transpose(1, 3) for _ in range(3))  # (2, 5, 3, 8)
    assert q.stride(-1) != 1
    out = fastattn.attention(q, k, v, backend=backend)
    same = fastattn.attention(*(t.contiguous() for t in (q, k, v)), backend=backend)
    assert torch.equal(out, same)


def untouched(elements: int, dtype: torch.dtype) -> Tensor:
    """So many elements of address space. Pages nobody touches take no memory."""
    try:
        return torch.empty(elements, dtype=dtype)
    except RuntimeError as error:  # a machine that grants no more memory than it has
        pytest.skip(f"no address space for {elements} elements: {error}")


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "sequence", "head"])
def test_offsets_past_2_to_31_elements(backend: str, dim: int) -> None:
    far = 2**31 + 64
    strides = [64, 32, 16]
    strides[dim] = far
    shape = (2, 2, 2, 16)
    small = [torch.randn(shape, dtype=torch.float16) for _ in range(3)]
    memory = untouched(far + 512, torch.float16)
    large = [memory[offset:].as_strided(shape, (*strides, 1)) for offset in (0, 128, 256)]
    for there, here in zip(large, small, strict=True):
        there.copy_(here)
    results = []
    for inputs in (large, small):
        q, k, v = (t.detach().requires_grad_() for t in inputs)
        out = fastattn.attention(q, k, v, causal=True, backend=backend)
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    assert all(torch.equal(*both) for both in zip(*results, strict=True))


# --- values that are no numbers -------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_bad_values_spread_as_in_eager(backend: str, where: str, value: float) -> None:
    """To what sees them, and nowhere else: not through a hidden key's weight of 0, nor to another
    head or batch entry."""
    p = make_problem(Case("", (2, 65, 65), (2, 2), 16, window=(-1, 0)), torch.float32)
    bad = getattr(p, where).clone()
    bad[1, 40, 1, 3] = value
    p = p._replace(**{where: bad})
    out, lse = public.attention(p, backend)
    expected, expected_lse = reference.attention(to_float64(p))
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    clean = expected.isfinite()
    torch.testing.assert_close(out.double()[clean], expected[clean], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_packed_sequences_do_not_see_each_other(backend: str, where: str) -> None:
    """NaN all over one of three neighbours in memory leaves the others' results as they were."""
    case = Case("", packed=((5, 7), (66, 64), (3, 9)), head_dim=24, window=(-1, 0))
    p = make_problem(case, torch.float32)
    bad = getattr(p, where).clone()
    first, end = (5, 71) if where == "q" else (7, 71)
    bad[first:end] = math.nan
    whole = attention_results(public.attention_on(backend), p)
    spoiled = attention_results(public.attention_on(backend), p._replace(**{where: bad}))
    for name in ("out", "dq"):
        assert spoiled[name][5:71].isnan().any()
        for rows in (slice(0, 5), slice(71, 74)):
            assert torch.equal(spoiled[name][rows], whole[name][rows])
    for name in ("dk", "dv"):
        for rows in (slice(0, 7), slice(71, 80)):
            assert torch.equal(spoiled[name][rows], whole[name][rows])


def test_huge_scores_do_not_overflow(backend: str) -> None:
    q = torch.full((1, 3, 1, 64), 1e4)
    out, lse = fastattn.attention(q, q, q, return_lse=True, backend=backend)  # s = 8e8
    torch.testing.assert_close(out, q)
    torch.testing.assert_close(lse, torch.full((1, 1, 3), 8e8 + math.log(3)))


def test_bias_of_minus_infinity_masks(backend: str) -> None:
    p = make_problem(Case("", (1, 9, 13), (2, 2), 8), torch.float32)
    mask = torch.rand(1, 2, 9, 13) > 0.4
    mask[:, :, 4] = False
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for name, ours in attention_results(
        public.attention_on(backend), p._replace(mask=mask)
    ).items():
        same = attention_results(public.attention_on(backend), p._replace(bias=bias))
        torch.testing.assert_close(same[name], ours)


# --- dropout --------------------------------------------------------------------------------------


def drop(backend: str, dropout_p: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights after dropout (1, 2, 16, 64), read off with V = identity, and lse; q = 0."""
    q, k = torch.zeros(1, 16, 2, 8), torch.zeros(1, 64, 2, 8)
    v = torch.eye(64)[None, :, None].expand(1, 64, 2, 64)
    torch.manual_seed(seed)
    out, lse = fastattn.attention(q, k, v, dropout_p=dropout_p, return_lse=True, backend=backend)
    return out.transpose(1, 2), lse


def test_dropout_drops_scales_and_leaves_lse(backend: str) -> None:
    weights, lse = drop(backend, 0.25)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full((int(kept.sum()),), 1 / 64 / 0.75))
    assert abs(kept.double().mean() - 0.75) < 0.03  # 2,048 weights: three standard deviations
    torch.testing.assert_close(lse, torch.full((1, 2, 16), math.log(64)))
    assert not drop(backend, 1.0)[0].any()


def test_dropout_follows_torchs_generator(backend: str) -> None:
    assert torch.equal(drop(backend, 0.5, seed=3)[0], drop(backend, 0.5, seed=3)[0])
    assert not torch.equal(drop(backend, 0.5, seed=3)[0], drop(backend, 0.5, seed=4)[0])


def test_dropout_is_the_same_on_every_backend(backend: str) -> None:
    assert torch.equal(drop(backend, 0.5)[0] != 0, drop("reference", 0.5)[0] != 0)


def test_only_dropout_uses_random_numbers(backend: str) -> None:
    q = torch.randn(1, 3, 2, 4)
    before = torch.get_rng_state()
    fastattn.attention(q, q, q, backend=backend)
    fastattn.explain(q, q, q, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)


# --- precision ------------------------------------------------------------------------------------


def test_autocast_narrows_q_k_v() -> None:
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = fastattn.attention(q, q, q)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    narrow = q.detach().bfloat16()
    assert torch.equal(out, fastattn.attention(narrow, narrow, narrow))
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention(*(q.double(),) * 3).dtype == torch.float64


@pytest.mark.parametrize("wide", [torch.float64, torch.float32], ids=public.name_of)
def test_options_of_other_dtypes(backend: str, wide: torch.dtype) -> None:
    """bias, slopes and sinks may be wider than q; their gradients come back in their dtypes."""
    q = torch.randn(2, 9, 2, 8, dtype=torch.float16)
    options = {
        "bias": torch.randn(2, 9, 9).to(wide).requires_grad_(),
        "sinks": torch.randn(2).to(wide).requires_grad_(),
        "alibi_slopes": torch.rand(2).to(wide),
    }
    out = fastattn.attention(q, q, q, **options, backend=backend)
    narrow = {name: t.detach().float() for name, t in options.items()}
    assert torch.equal(out, fastattn.attention(q, q, q, **narrow, backend=backend))
    out.float().square().sum().backward()
    assert options["bias"].grad.dtype == options["sinks"].grad.dtype == wide


def test_every_row_of_the_table_is_tested() -> None:
    """The `backend` argument of these tests goes over the table's usable rows."""
    assert {row.name for row in backends.TABLE} == {"cuda", "triton", "cpu", "reference"}
