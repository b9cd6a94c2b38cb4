"""The bound has teeth: right answers pass, planted faults do not, messages say why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn import reference
from fastattn.problem import AttentionProblem, CrossEntropyProblem
from fastattn.testing import (
    CASES,
    CAUSAL,
    CE_CASES,
    DECODE_CASES,
    Case,
    CrossEntropyCase,
    DecodeCase,
    assert_close_to_reference,
    check_attention,
    check_cross_entropy,
    check_decode,
    make_cross_entropy_problem,
    make_decode_problem,
    make_problem,
    random_like,
    to_float64,
)


def test_bound_is_factor_times_eager_plus_one_ulp() -> None:
    ref64 = torch.tensor([1.0, -2.0], dtype=torch.float64)
    eager = ref64 + torch.tensor([1e-3, 0.0]).double()
    bound = 2 * 1e-3 + 2 * torch.finfo(torch.float32).eps
    assert_close_to_reference((ref64 + 0.999 * bound).float(), ref64, eager, 2.0)
    with pytest.raises(AssertionError, match=r"out: max error .* = 2 · 1.000e-03 .* at \(0,\)"):
        assert_close_to_reference(
            (ref64 - torch.tensor([1.01 * bound, 0.0]).double()).float(), ref64, eager, 2.0, "out"
        )


def test_rounding_alone_is_allowed_and_no_more() -> None:
    ref64 = torch.linspace(-3, 3, 101, dtype=torch.float64)
    rounded = ref64.bfloat16()
    assert_close_to_reference(rounded, ref64, ref64, 2.0)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close_to_reference((ref64 * (1 + 2**-6)).bfloat16(), ref64, ref64, 2.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_must_be_so_in_both(value: float) -> None:
    ref64 = torch.tensor([0.0, 1.0], dtype=torch.float64)
    special = torch.tensor([0.0, value])
    assert_close_to_reference(special, special.double(), special, 2.0)
    for ours, expected in ((special, ref64), (ref64.float(), special.double())):
        with pytest.raises(AssertionError, match=r"1 of 2 elements .* first at \(1,\)"):
            assert_close_to_reference(ours, expected, ref64, 2.0)
    with pytest.raises(AssertionError, match="yardstick"):
        assert_close_to_reference(ref64.float(), ref64, special, 2.0)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_reference(ref64.float()[:1], ref64, ref64, 2.0)


Change = Callable[[AttentionProblem], AttentionProblem]
FAULTS: dict[str, tuple[Case, Change]] = {
    "window": (Case("c", window=(5, 0)), lambda p: p._replace(window_left=4)),
    "off-by-one": (Case("c", window=CAUSAL), lambda p: p._replace(window_right=1)),
    "scale": (Case("c"), lambda p: p._replace(scale=p.scale * (1 + 1 / 64))),
    "softcap": (Case("c", softcap=5.0), lambda p: p._replace(softcap=0.0)),
    "mask": (Case("c", mask="b11k"), lambda p: p._replace(mask=None)),
    "bias": (Case("c", bias="1hqk"), lambda p: p._replace(bias=p.bias * 0.98)),
    "alibi": (Case("c", alibi="h"), lambda p: p._replace(alibi_slopes=p.alibi_slopes.flip(0))),
    "sinks": (Case("c", sinks=True), lambda p: p._replace(sinks=p.sinks.flip(0))),
    "seed": (Case("c", dropout_p=0.01), lambda p: p._replace(seed=p.seed + 1)),
    "last-key": (Case("c", (1, 9, 257)), lambda p: p._replace(k=p.k[:, :256], v=p.v[:, :256])),
    "heads": (Case("c", heads=(4, 2)), lambda p: p._replace(k=p.k.flip(2))),
    "batch": (Case("c"), lambda p: p._replace(v=p.v[:1].expand_as(p.v))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "change"), FAULTS.values(), ids=FAULTS.keys())
def test_planted_faults_are_caught(case: Case, change: Change, dtype: torch.dtype) -> None:
    p = make_problem(case, dtype)
    with pytest.raises(AssertionError, match=r"over the bound|are finite"):
        check_attention(lambda problem: reference.attention(change(problem)), p)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_a_wrong_gradient_is_caught(name: str, dtype: torch.dtype, share: float) -> None:
    p = make_problem(Case("c", window=CAUSAL, sinks=True), dtype)

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, dx: Tensor) -> Tensor:
            return (1 + share) * dx

    with pytest.raises(AssertionError, match=f"d{name}: max error"):
        check_attention(
            lambda problem: reference.attention(
                problem._replace(**{name: Off.apply(getattr(problem, name))})
            ),
            p,
        )


def test_a_decode_that_forgets_its_append_is_caught() -> None:
    p = make_decode_problem(DecodeCase("d", seqlen_new=1), torch.float32)

    def forgetful(p):
        return reference.attention_decode(
            p._replace(k_cache=p.k_cache.clone(), v_cache=p.v_cache.clone())
        )

    check_decode(reference.attention_decode, p)
    with pytest.raises(AssertionError, match="k_cache"):
        check_decode(forgetful, p)


def test_cross_entropy_by_lse_minus_logit_is_caught() -> None:
    p = make_cross_entropy_problem(CrossEntropyCase("c", offset=2.0**24, ignored=0), torch.float32)

    def cancelling(p: CrossEntropyProblem) -> tuple[Tensor, Tensor]:
        lse = torch.logsumexp(p.logits, -1)
        return lse - p.logits.gather(1, p.target[:, None])[:, 0], lse

    with pytest.raises(AssertionError, match="loss: max error"):
        check_cross_entropy(cancelling, p)


def test_cases_have_distinct_names_and_reproducible_inputs() -> None:
    for cases, make in (
        (CASES, make_problem),
        (DECODE_CASES, make_decode_problem),
        (CE_CASES, make_cross_entropy_problem),
    ):
        assert len({case.name for case in cases}) == len(cases)
        first, again, other = (make(cases[0], torch.float32, seed) for seed in (0, 0, 1))
        assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("case", [c for c in CASES if c.strides != "contiguous"], ids=str)
def test_layouts_are_views_with_unit_last_stride(case: Case) -> None:
    p = make_problem(case, torch.float32)
    assert all(x.stride(-1) == 1 for x in (p.q, p.k, p.v))
    assert not any(x.is_contiguous() for x in (p.q, p.k, p.v))
    if case.strides == "expanded":
        assert p.q.stride(1) == 0 and p.k.stride(0) == p.k.stride(2) == p.v.stride(0) == 0
    if case.strides == "qkv":
        assert p.q.untyped_storage().data_ptr() == p.v.untyped_storage().data_ptr()


def test_gradients_sent_back_are_exact_in_every_dtype() -> None:
    wide = random_like(torch.empty(1000, dtype=torch.float64), 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(random_like(torch.empty(1000, dtype=dtype), 1).double(), wide)


def test_to_float64_keeps_the_rounded_values_and_the_integers() -> None:
    p = make_problem(Case("c", packed=((3, 3),), mask="11qk", sinks=True), torch.bfloat16)
    wide = to_float64(p)
    assert wide.q.dtype == wide.sinks.dtype == torch.float64 and torch.equal(wide.q, p.q.double())
    assert wide.mask.dtype == torch.bool and wide.cu_seqlens_q.dtype == torch.int32
