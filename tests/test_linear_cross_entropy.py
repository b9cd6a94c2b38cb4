"""The Triton kernel whose logits never reach memory, in the interpreter, held to the reference."""

from __future__ import annotations

from typing import Any

import interpreter_checks
import public
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import backend_triton
from fastattn.problem import LinearCrossEntropyProblem
from fastattn.testing import (
    LINEAR_CE_CASES,
    CrossEntropyCase,
    assert_results_close,
    eager_linear_cross_entropy,
    make_linear_cross_entropy_problem,
    to_float64,
)

if (reason := backend_triton.unusable()) is not None:
    pytest.skip(reason, allow_module_level=True)
if not backend_triton.interpreted():
    pytest.skip("these tests are of the interpreter", allow_module_level=True)

EVERYTHING = next(case for case in LINEAR_CE_CASES if case.name == "everything")
make = make_linear_cross_entropy_problem


def triton(p: LinearCrossEntropyProblem) -> tuple[Tensor, Tensor]:
    return torch.ops.fastattn.linear_cross_entropy_fwd(*p, 1 << 20, "triton")


def check(p: LinearCrossEntropyProblem) -> None:
    """Loss and lse alone: the gradients go another way."""
    ours = triton(p)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    ref64, eager = (eager_linear_cross_entropy(problem) for problem in (to_float64(p), p))
    assert_results_close(
        *(dict(zip(("loss", "lse"), r, strict=True)) for r in (ours, ref64, eager))
    )


@pytest.mark.parametrize("case", LINEAR_CE_CASES, ids=str)
def test_it_is_the_references(case: CrossEntropyCase) -> None:
    check(make(case, public.KERNEL_DTYPES[LINEAR_CE_CASES.index(case) % 3]))


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=public.name_of)
@pytest.mark.parametrize("channels", [1, 64, 128])
def test_every_dtype_and_number_of_channels(channels: int, dtype: torch.dtype) -> None:
    check(make(EVERYTHING, dtype, channels=channels, bias=channels > 1))


def test_any_strides() -> None:
    p = make(EVERYTHING, torch.float32)
    across = p._replace(x=p.x.t().contiguous().t(), linear_weight=p.linear_weight.t().clone().t())
    apart = p._replace(
        x=F.pad(p.x, (0, 3))[:, : p.x.shape[1]], linear_weight=F.pad(p.linear_weight, (5, 0))[:, 5:]
    )
    for other in (across, apart):
        for ours, same in zip(triton(other), triton(p), strict=True):
            assert torch.equal(ours, same)


@pytest.mark.parametrize("offset", [2.0**14, 2.0**24])
def test_far_from_zero_the_loss_keeps_its_bits(offset: float) -> None:
    """lse − z would be rounded by 1 at 2²⁴; splits are merged with the same care."""
    p = make(CrossEntropyCase("", 5, 1000, label_smoothing=0.1), torch.float32, channels=1)
    p = p._replace(x=torch.ones(5, 1), linear_weight=2.0 * torch.randint(-8, 8, (1000, 1)))
    p = p._replace(linear_bias=torch.full((1000,), offset))
    loss, _ = triton(p)
    near, _ = triton(p._replace(linear_bias=None))
    torch.testing.assert_close(loss, near, rtol=1e-6, atol=1e-6)


def test_it_stays_in_bounds_and_races_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: where no gradient is wanted, the public function takes it."""
    p = make(EVERYTHING, torch.bfloat16)
    options: dict[str, Any] = {"linear_bias": p.linear_bias, "ignore_index": p.ignore_index}
    options |= {"label_smoothing": 0.1, "weight": p.weight, "backend": "triton"}
    x = p.x.clone().requires_grad_()
    with interpreter_checks.watched(monkeypatch) as watch, torch.no_grad():
        fastattn.linear_cross_entropy(x, p.linear_weight, p.target, **options)
    assert watch.launches == 2


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return result


def test_no_logits_are_held() -> None:
    p = make(CrossEntropyCase("", rows=64, vocab=500), torch.float32, channels=8)
    with Largest() as largest:
        backend_triton.linear_cross_entropy_fwd(p)
    assert 64 * 5 <= largest.numel <= 64 * 5 * 4 < 64 * 500
