"""The CUDA cross-entropy kernel, run by the emulator: what is its alone.

The loss's contract is in test_losses.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import emulated
import pytest
import torch
from emulator.runtime import Library
from torch import Tensor

from fastattn import reference
from fastattn.problem import CrossEntropyProblem
from fastattn.testing import (
    CE_CASES,
    CrossEntropyCase,
    Results,
    assert_results_close,
    cross_entropy_expected,
    eager_cross_entropy,
    make_cross_entropy_problem,
    random_like,
    to_float64,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHS = (75, 80, 90)
# 16-byte vectors of a row on both sides of what threads and unrolling step over: 32 to 512 threads
STEPS = tuple(
    CrossEntropyCase(f"vocab-{vocab}", rows=3, vocab=vocab)
    for vocab in (8, 255, 256, 1023, 1025, 2051, 4095, 16383, 16385, 16400, 33000)
)
ROUNDED = tuple(c for c in CE_CASES if c.name in ("plain", "everything", "padded", "all-ignored"))
# longer than what shared memory holds in at least some dtypes and architectures
LONG = (
    CrossEntropyCase("vocab-128256", rows=2, vocab=128256, ignored=0.5),
    CrossEntropyCase("rich-60001", rows=2, vocab=60001, softcap=15.0, weight=True),
)

if (reason := emulated.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def emulator() -> Iterator[Library]:
    torch.ops.load_library(str(emulated.build()))
    emulator = Library(emulated.build())
    yield emulator
    emulator.set_options()


def forward(
    p: CrossEntropyProblem, dloss: Tensor | None = None, dlogits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    loss, lse = torch.full((2, p.logits.shape[0]), math.nan)
    torch.ops.fastattn_emulated.cross_entropy_fwd(*p, dloss, loss, lse, dlogits)
    return loss, lse


def backward(
    p: CrossEntropyProblem,
    lse: Tensor,
    dloss: Tensor,
    dlse: Tensor | None = None,
    dlogits: Tensor | None = None,
) -> Tensor:
    dlogits = torch.full_like(p.logits, math.nan) if dlogits is None else dlogits
    torch.ops.fastattn_emulated.cross_entropy_bwd(*p, lse, dloss, dlse, dlogits)
    return dlogits


def problem(logits: list[list[float]], target: list[int], dtype: torch.dtype = torch.float32):
    return CrossEntropyProblem(torch.tensor(logits).to(dtype), torch.tensor(target))


def copy_of(logits: Tensor) -> Tensor:
    """Of the same strides: a row's alignment decides which thread adds up what."""
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype).copy_(logits)


def check(p: CrossEntropyProblem) -> None:
    loss, lse = forward(p)
    dlogits = backward(p, lse, random_like(loss, 1), random_like(lse, 2))
    ours: Results = {"loss": loss, "lse": lse, "dlogits": dlogits}
    assert_results_close(ours, *cross_entropy_expected(p))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CE_CASES, *STEPS], ids=str)
def test_results_are_within_the_bound(case: CrossEntropyCase, dtype: torch.dtype) -> None:
    check(make_cross_entropy_problem(case, dtype))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_rows_may_be_longer_than_shared_memory(
    case: CrossEntropyCase, dtype: torch.dtype, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_EMULATE_ARCH", str(arch))
    check(make_cross_entropy_problem(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CE_CASES, ids=str)
def test_the_gradient_may_take_the_logits_place(case: CrossEntropyCase, dtype: torch.dtype) -> None:
    p = make_cross_entropy_problem(case, dtype)
    dloss = random_like(torch.empty(p.logits.shape[0]), 1)
    loss, lse = forward(p)
    fused, expected = torch.full_like(p.logits, math.nan), backward(p, lse, dloss)
    for x, y in zip(forward(p, dloss, fused), (loss, lse), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(fused, expected)

    in_place = p._replace(logits=copy_of(p.logits))
    forward(in_place, dloss, in_place.logits)
    assert torch.equal(in_place.logits, expected)
    in_place = p._replace(logits=copy_of(p.logits))
    backward(in_place, lse, dloss, dlogits=in_place.logits)
    assert torch.equal(in_place.logits, expected)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("pad", (0, 1, 4))  # rows of the gradient aligned otherwise, or as x's
@pytest.mark.parametrize("case", (*ROUNDED, STEPS[1], STEPS[5]), ids=str)
def test_the_gradient_of_float32_may_be_rounded(
    case: CrossEntropyCase, pad: int, dtype: torch.dtype
) -> None:
    p = make_cross_entropy_problem(case, torch.float32)
    dloss = 1000 * random_like(torch.empty(p.logits.shape[0]), 1)
    _, lse = forward(p)
    expected = backward(p, lse, dloss).to(dtype)
    wide = torch.full((p.logits.shape[0], p.logits.shape[1] + pad), 7.0, dtype=dtype)
    inside = wide[:, : p.logits.shape[1]]
    backward(p, lse, dloss, dlogits=inside)
    assert torch.equal(inside, expected)
    inside.fill_(math.nan)
    forward(p, dloss, inside)
    assert torch.equal(inside, expected)
    assert (wide[:, p.logits.shape[1] :] == 7.0).all()


def test_a_rounded_gradient_has_no_place_among_the_logits() -> None:
    p = problem([[1.0, 2.0]], [0])
    with pytest.raises(RuntimeError, match="dlogits must be of the logits' dtype"):
        forward(p, torch.ones(()), p.logits.view(torch.float16)[:, :2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", (1, 3, 15, 33, 520, 2049))
@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_rows_of_any_alignment_stay_within_their_bounds(
    vocab: int, dtype: torch.dtype, label_smoothing: float
) -> None:
    rows, inside = 9, (slice(None), slice(2, vocab + 2))
    logits = torch.full((rows, vocab + 5), math.nan, dtype=dtype)
    logits[inside] = torch.randn(rows, vocab).to(dtype)
    p = CrossEntropyProblem(
        logits[inside], torch.randint(vocab, (rows,)), label_smoothing=label_smoothing
    )
    ones = torch.ones(rows)
    for pad in (5, 4):  # rows of the gradient aligned as those of the logits, and otherwise
        dlogits = torch.full((rows, vocab + pad), 7.0, dtype=dtype)
        lse = forward(p, ones, dlogits[inside])[1]
        ours: Results = {"lse": lse, "dlogits": dlogits[inside].clone()}
        dlogits[inside] = 7.0
        assert (dlogits == 7.0).all()
        assert_results_close(ours, *expected_of_ones(p))


def expected_of_ones(p: CrossEntropyProblem) -> tuple[Results, Results]:
    """lse and dlogits for dloss = 1: the float64 reference's, and textbook code's."""
    results = []
    for function, q in ((reference.cross_entropy, to_float64(p)), (eager_cross_entropy, p)):
        logits = q.logits.detach().requires_grad_()
        loss, lse = function(q._replace(logits=logits))
        (dlogits,) = torch.autograd.grad(loss.sum(), logits)
        results.append({"lse": lse.detach(), "dlogits": dlogits})
    return results[0], results[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (CE_CASES[0], STEPS[-1], CE_CASES[14]), ids=str)
def test_schedules_change_no_bit(
    case: CrossEntropyCase, dtype: torch.dtype, emulator: Library
) -> None:
    p = make_cross_entropy_problem(case, dtype)
    dloss, results = torch.tensor(0.25), []
    for seed in range(4):
        emulator.set_options(f"seed={seed}")
        loss, lse = forward(p)
        results.append((loss, lse, backward(p, lse, dloss)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("target", (-1, 3))
def test_targets_out_of_range_fail_an_assertion(target: int) -> None:
    code = f"""
import torch
torch.ops.load_library({str(emulated.build())!r})
x, target, out = torch.zeros(2, 3), torch.tensor([0, {target}]), torch.zeros(2)
torch.ops.fastattn_emulated.cross_entropy_fwd(
    x, target, None, -100, 0.0, 0.0, 0.0, None, out, out.clone(), None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "target < p.vocab" in done.stderr
