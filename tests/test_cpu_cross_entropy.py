"""The CPU cross-entropy kernels: what is theirs alone. The loss's contract is in test_losses.py."""

from __future__ import annotations

import math

import cpu_isa
import pytest
import torch
from torch import Tensor

from fastattn import library
from fastattn.problem import CrossEntropyProblem
from fastattn.testing import (
    CE_CASES,
    CrossEntropyCase,
    Results,
    assert_results_close,
    cross_entropy_expected,
    make_cross_entropy_problem,
    random_like,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# over 4 MiB in every dtype: its gradient is written past the caches
LONG = CrossEntropyCase("long", rows=71, vocab=30011, padding=2)

if (reason := library.load_error()) is not None:
    pytest.skip(reason, allow_module_level=True)


def forward(
    p: CrossEntropyProblem, dloss: Tensor | None = None, dlogits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    loss, lse = torch.full((2, p.logits.shape[0]), math.nan)
    torch.ops.fastattn_C.cross_entropy_fwd(*p, dloss, loss, lse, dlogits)
    return loss, lse


def backward(
    p: CrossEntropyProblem,
    lse: Tensor,
    dloss: Tensor,
    dlse: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> Tensor:
    dlogits = torch.full_like(p.logits, math.nan) if dlogits is None else dlogits
    torch.ops.fastattn_C.cross_entropy_bwd(*p, lse, dloss, dlse, dlogits)
    return dlogits


def problem(logits: list[list[float]], target: list[int], dtype: torch.dtype = torch.float32):
    return CrossEntropyProblem(torch.tensor(logits).to(dtype), torch.tensor(target))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CE_CASES, LONG], ids=str)
def test_results_are_within_the_bound(case: CrossEntropyCase, dtype: torch.dtype) -> None:
    p = make_cross_entropy_problem(case, dtype)
    loss, lse = forward(p)
    dlogits = backward(p, lse, random_like(loss, 1), random_like(lse, 2))
    ours: Results = {"loss": loss, "lse": lse, "dlogits": dlogits}
    assert_results_close(ours, *cross_entropy_expected(p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CE_CASES, LONG], ids=str)
def test_the_gradient_may_take_the_logits_place(case: CrossEntropyCase, dtype: torch.dtype) -> None:
    p = make_cross_entropy_problem(case, dtype)
    dloss = random_like(torch.empty(p.logits.shape[0]), 1)
    loss, lse = forward(p)
    fused, expected = torch.full_like(p.logits, math.nan), backward(p, lse, dloss)
    for x, y in zip(forward(p, dloss, fused), (loss, lse), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)

    in_place = p._replace(logits=p.logits.clone())
    forward(in_place, dloss, in_place.logits)
    assert torch.equal(in_place.logits, fused)
    in_place = p._replace(logits=p.logits.clone())
    backward(in_place, lse, dloss, dlogits=in_place.logits)
    assert torch.equal(in_place.logits, expected)
    # The two differ by what rounding lse costs: exp(z − m) / l against exp(z − lse) / l'.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(fused, expected, rtol=4 * max(eps, 2e-7), atol=1e-6)


@pytest.mark.parametrize("case", [*CE_CASES, LONG], ids=str)
def test_the_gradient_of_float32_may_be_bfloat16_in_its_place(case: CrossEntropyCase) -> None:
    p = make_cross_entropy_problem(case, torch.float32)
    dloss = random_like(torch.empty(p.logits.shape[0]), 1)
    exact = torch.full_like(p.logits, math.nan)
    loss, lse = forward(p, dloss, exact)
    expected = exact.to(torch.bfloat16)

    apart = torch.full_like(p.logits, math.nan, dtype=torch.bfloat16)
    forward(p, dloss, apart)
    assert torch.equal(apart, expected)
    for in_backward in (False, True):
        logits = p.logits.clone()  # contiguous
        inside = logits.view(torch.bfloat16)[:, : logits.shape[1]]
        in_place = p._replace(logits=logits)
        if in_backward:
            expected = backward(p, lse, dloss).to(torch.bfloat16)
            backward(in_place, lse, dloss, dlogits=inside)
        else:
            assert torch.equal(forward(in_place, dloss, inside)[0], loss)
        assert torch.equal(inside, expected)


def test_other_dtypes_of_the_gradient_are_refused() -> None:
    for logits, dlogits in ((torch.float32, torch.float16), (torch.bfloat16, torch.float32)):
        p = problem([[1.0, 2.0]], [0], logits)
        with pytest.raises(RuntimeError, match="dlogits must be of the logits' dtype"):
            forward(p, torch.ones(1), torch.empty(1, 2, dtype=dlogits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (1, 15, 33, 2047, 2049, 4097))
def test_rows_of_any_alignment_stay_within_their_bounds(vocab: int, dtype: torch.dtype) -> None:
    rows = 2 + (5 << 20) // vocab if vocab > 4000 else 5  # the longest are written past the caches
    inside = (slice(None), slice(2, vocab + 2))
    logits = torch.full((rows, vocab + 5), math.nan, dtype=dtype)
    logits[inside] = torch.randn(rows, vocab).to(dtype)
    p = CrossEntropyProblem(logits[inside], torch.randint(vocab, (rows,)))
    dlogits = torch.full_like(logits, 7.0)
    lse = forward(p, torch.ones(rows), dlogits[inside])[1]
    compact = p._replace(logits=p.logits.contiguous())
    assert torch.equal(forward(compact)[1], lse)
    expected = torch.full_like(compact.logits, math.nan)
    forward(compact, torch.ones(rows), expected)
    assert torch.equal(dlogits[inside], expected)
    dlogits[inside] = 7.0
    assert (dlogits == 7.0).all()


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_results_do_not_depend_on_the_threads(label_smoothing: float) -> None:
    p = make_cross_entropy_problem(LONG, torch.float32)._replace(label_smoothing=label_smoothing)
    dloss, threads = torch.tensor(0.25), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            loss, lse = forward(p)
            results.append((loss, lse, backward(p, lse, dloss)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", cpu_isa.others())
def test_every_instruction_set_passes_these_tests(isa: str) -> None:
    cpu_isa.run_file(__file__, isa, "not instruction_set")
