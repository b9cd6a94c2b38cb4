"""The specification of the losses against F.cross_entropy, second formulas and gradcheck."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastattn import reference
from fastattn.problem import CrossEntropyProblem
from fastattn.testing import (
    CE_CASES,
    CrossEntropyCase,
    check_cross_entropy,
    cross_entropy_results,
    make_cross_entropy_problem,
    random_like,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"rtol": 1e-10, "atol": 1e-12}


def randn64(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("case", CE_CASES, ids=str)
def test_cross_entropy_by_hand(case: CrossEntropyCase) -> None:
    p = make_cross_entropy_problem(case, torch.float64)
    loss, lse = reference.cross_entropy(p)
    z = p.logits if p.softcap == 0 else p.softcap * torch.tanh(p.logits / p.softcap)
    log_p = torch.log_softmax(z, dim=-1)
    weight = torch.ones(case.vocab).double() if p.weight is None else p.weight.double()
    for n, y in enumerate(p.target.tolist()):
        expected_lse = torch.logsumexp(z[n], 0)
        torch.testing.assert_close(lse[n], expected_lse, **SMALL)
        expected = torch.zeros(()).double()
        if y != p.ignore_index:
            smooth = -(weight * log_p[n]).mean()
            expected = -(1 - p.label_smoothing) * weight[y] * log_p[n, y]
            expected = expected + p.label_smoothing * smooth + p.z_loss * expected_lse**2
        torch.testing.assert_close(loss[n], expected, **SMALL)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_cross_entropy_is_torchs(
    reduction: str, label_smoothing: float, weighted: bool, ignore_index: int
) -> None:
    logits, target = randn64(12, 7).requires_grad_(), torch.randint(7, (12,))
    target[::4] = ignore_index
    weight = torch.rand(7).double() if weighted else None
    expected = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    loss, _ = reference.cross_entropy(
        CrossEntropyProblem(logits, target, weight, ignore_index, label_smoothing)
    )
    if reduction == "sum":
        loss = loss.sum()
    if reduction == "mean":
        counted = target[target != ignore_index]
        loss = loss.sum() / (len(counted) if weight is None else weight[counted].sum())
    torch.testing.assert_close(loss, expected, **SMALL)
    dloss = torch.randn_like(loss)
    (grad,) = torch.autograd.grad(loss, logits, dloss)
    (expected_grad,) = torch.autograd.grad(expected, logits, dloss)
    torch.testing.assert_close(grad, expected_grad, **SMALL)


@pytest.mark.parametrize("case", CE_CASES, ids=str)
def test_cross_entropy_backward_is_autograd(case: CrossEntropyCase) -> None:
    p = make_cross_entropy_problem(case, torch.float64)
    expected = cross_entropy_results(reference.cross_entropy, p)
    dloss, dlse = random_like(expected["loss"], 1), random_like(expected["lse"], 2)
    dlogits = reference.cross_entropy_backward(p, expected["lse"], dloss, dlse)
    torch.testing.assert_close(dlogits, expected["dlogits"], **SMALL)
    alone = reference.cross_entropy_backward(p, expected["lse"], dloss)
    assert (alone[p.target == p.ignore_index] == 0).all()
    assert torch.equal(
        alone, reference.cross_entropy_backward(p, expected["lse"], dloss, torch.zeros_like(dlse))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CE_CASES, ids=str)
def test_cross_entropy_in_low_precision_keeps_the_bound(
    case: CrossEntropyCase, dtype: torch.dtype
) -> None:
    p = make_cross_entropy_problem(case, dtype)
    check_cross_entropy(reference.cross_entropy, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CE_CASES, ids=str)
def test_cross_entropy_backward_in_low_precision(
    case: CrossEntropyCase, dtype: torch.dtype
) -> None:
    """The written-out gradient keeps the bound too: at an offset of 2^24 it cannot use the lse."""
    p = make_cross_entropy_problem(case, dtype)

    class Written(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits: Tensor) -> tuple[Tensor, Tensor]:
            loss, lse = reference.cross_entropy(p._replace(logits=logits))
            ctx.lse = lse
            return loss, lse

        @staticmethod
        def backward(ctx, dloss: Tensor, dlse: Tensor) -> Tensor:
            return reference.cross_entropy_backward(p, ctx.lse, dloss, dlse)

    check_cross_entropy(lambda problem: Written.apply(problem.logits), p)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"weight": torch.tensor([0.5, 1.0, 0.0, 2.0, 1.5], dtype=torch.float64)},
        {"z_loss": 0.1},
        {"softcap": 1.5},
        {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 1.5, "ignore_index": 1},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_cross_entropy_is_twice_differentiable(options: dict) -> None:
    target = torch.tensor([0, 1, 4, -100]) if "ignore_index" not in options else torch.arange(4)
    logits = randn64(4, 5).requires_grad_()

    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        return reference.cross_entropy(CrossEntropyProblem(logits, target, **options))

    assert gradcheck(function, [logits])
    assert gradgradcheck(function, [logits])


def test_loss_survives_a_large_offset() -> None:
    logits = torch.tensor([[0.0, 2.0, 4.0, -6.0]])
    target = torch.tensor([1])
    loss, _ = reference.cross_entropy(CrossEntropyProblem(logits, target))
    shifted, lse = reference.cross_entropy(CrossEntropyProblem(logits + 2.0**24, target))
    assert torch.equal(loss, shifted) and lse.item() == 2.0**24 + 4


def test_ignored_rows_still_have_an_lse_and_its_gradient() -> None:
    logits = randn64(3, 5).requires_grad_()
    p = CrossEntropyProblem(logits, torch.full((3,), -100), z_loss=0.1, label_smoothing=0.1)
    loss, lse = reference.cross_entropy(p)
    assert (loss == 0).all()
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1), **SMALL)
    (from_loss,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (from_lse,) = torch.autograd.grad(lse.sum(), logits)
    assert (from_loss == 0).all()
    torch.testing.assert_close(from_lse, torch.softmax(logits, -1), **SMALL)


def test_written_gradient_of_an_ignored_row_is_zero_even_for_nan_logits() -> None:
    logits = torch.randn(2, 5)
    logits[0, 3] = torch.nan
    p = CrossEntropyProblem(logits, torch.tensor([-100, 2]))
    loss, lse = reference.cross_entropy(p)
    assert loss[0] == 0 and lse[0].isnan()
    dlogits = reference.cross_entropy_backward(p, lse, torch.ones(2))
    assert (dlogits[0] == 0).all() and dlogits[1].isfinite().all()


def test_linear_cross_entropy_is_cross_entropy_of_the_product() -> None:
    x, linear_weight, bias = randn64(9, 4), randn64(7, 4), randn64(7)
    target = torch.randint(7, (9,))
    target[2] = -1
    options = {
        "weight": torch.rand(7).double(),
        "ignore_index": -1,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 3.0,
    }
    logits = x @ linear_weight.T + bias
    expected = reference.cross_entropy(CrossEntropyProblem(logits, target, **options))
    got = reference.linear_cross_entropy(x, linear_weight, target, linear_bias=bias, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **SMALL)

    def function(x: Tensor, linear_weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return reference.linear_cross_entropy(x, linear_weight, target, linear_bias=bias, **options)

    leaves = [t.requires_grad_() for t in (x, linear_weight, bias)]
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


def test_linear_cross_entropy_never_rounds_the_logits() -> None:
    x, linear_weight = torch.randn(5, 64).bfloat16(), torch.randn(33, 64).bfloat16()
    target = torch.randint(33, (5,))
    loss, _ = reference.linear_cross_entropy(x, linear_weight, target)
    wide, _ = reference.linear_cross_entropy(x.float(), linear_weight.float(), target)
    assert loss.dtype == torch.float32 and torch.equal(loss, wide)
    exact = F.cross_entropy(x.double() @ linear_weight.double().T, target, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
