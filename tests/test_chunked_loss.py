"""Linear cross-entropy by chunks: its memory, its precision, and no trace of where chunks end."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import chunked_loss
from fastattn.problem import LinearCrossEntropyProblem
from fastattn.products import TorchProducts

VOCAB, CHANNELS = 257, 16


def inputs(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """x, linear_weight, linear_bias, requiring gradients, and targets."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, CHANNELS), (VOCAB, CHANNELS), (VOCAB,))
    leaves = [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]
    return [*leaves, torch.randint(VOCAB, (n,), generator=g)]


def problem(n: int, dtype: torch.dtype = torch.float32) -> LinearCrossEntropyProblem:
    return LinearCrossEntropyProblem(*(t.detach() for t in inputs(n, dtype)))


def loss_and_gradients(tensors: list[Tensor], rows: int, **options) -> list[Tensor]:
    x, w, b, target = tensors
    loss = fastattn.linear_cross_entropy(
        x, w, target, linear_bias=b, workspace_bytes=rows * VOCAB * 4, **options
    )
    loss = sum(t.sum() for t in loss) if isinstance(loss, tuple) else loss.sum()
    return [loss.detach(), *torch.autograd.grad(loss, (x, w, b))]


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("n", [1, 7, 20])
@pytest.mark.parametrize("rows", [1, 3, 19, 1000])
def test_chunks_leave_no_trace(n: int, rows: int, options: dict) -> None:
    tensors = inputs(n)
    for got, whole in zip(
        loss_and_gradients(tensors, rows, **options),
        loss_and_gradients(tensors, n, **options),
        strict=True,
    ):
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-6)


class LogitsAlive(TorchDispatchMode):
    """The most bytes of (rows, V) tensors, Wᵀ apart, alive at a time; seen after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor) and t.shape[1:] == (VOCAB,) and t.shape[0] != CHANNELS:
                self.seen.append(weakref.ref(t))
        alive = [t.untyped_storage() for ref in self.seen if (t := ref()) is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
        self.most = max(self.most, sum(sizes.values()))
        return result


@pytest.mark.parametrize("compute", ["forward", "forward_backward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_stay_within_the_budget(dtype: torch.dtype, compute: str) -> None:
    p = problem(64, dtype)
    budget = 5 * VOCAB * 4
    rows = torch.ones(64)
    arguments = {
        "forward": (),
        "forward_backward": (torch.tensor(1 / 64), True, True, True),
        "backward": (rows, rows, rows),
    }
    with LogitsAlive() as logits:
        getattr(chunked_loss, compute)(p, *arguments[compute], budget, None)
    assert 0.9 * budget < logits.most <= budget


def test_chunks_are_of_about_equal_size() -> None:
    """33 rows in chunks of at most 32 are 17 and 16, not 32 and 1."""
    chunks = chunked_loss._Chunks(problem(33), TorchProducts(), 32 * VOCAB * 4)
    sizes = [chunk.x.shape[0] for chunk in chunks]
    assert sizes == [17, 16]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_weights_gradient_accumulates_in_float32(reduction: str) -> None:
    """512 rows add 1/2 each. In bf16 the sum would stay at 128, where 1/2 is half a unit in the
    last place."""
    x = torch.ones(512, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = fastattn.linear_cross_entropy(
        x, w, torch.zeros(512, dtype=torch.int64), reduction=reduction, workspace_bytes=8
    )
    loss.sum().backward()
    assert w.grad.flatten().tolist() == [-256.0, 256.0]
    running = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(512):
        running += 0.5
    assert running == 128  # so the test would notice


def test_float16_gradients_survive_until_the_loss_scale() -> None:
    """dx of a mean over many rows is below fp16's smallest number before it is scaled up."""
    n = 4096
    x = torch.randn(n, 4).half().requires_grad_()
    w = (torch.randn(8, 4) / 64).half()
    target = torch.randint(8, (n,))
    (fastattn.linear_cross_entropy(x, w, target) * 2.0**16).backward()
    x64 = x.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x64 @ w.double().T, target)
    (loss * 2.0**16).backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_not_rounded(dtype: torch.dtype) -> None:
    """The loss is that of exact logits of the rounded inputs, to fp32's precision."""
    x, w, b, target = inputs(20, dtype)
    loss = fastattn.linear_cross_entropy(x, w, target, linear_bias=b)
    exact = torch.nn.functional.cross_entropy(x.double() @ w.double().T + b.double(), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_weight_of_any_strides() -> None:
    x, w, b, target = inputs(20)
    transposed = w.detach().T.contiguous().T.requires_grad_()
    assert transposed.stride() == (1, VOCAB)
    for got, same in zip(
        loss_and_gradients([x, transposed, b, target], 7),
        loss_and_gradients([x, w, b, target], 7),
        strict=True,
    ):
        torch.testing.assert_close(got, same)


def test_workspace_of_less_than_a_row_holds_one() -> None:
    tensors = inputs(5)
    for got, same in zip(
        loss_and_gradients(tensors, 1),
        loss_and_gradients(tensors, 5),
        strict=True,
    ):
        torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-6)
    x, w, _, target = tensors
    assert fastattn.linear_cross_entropy(x, w, target, workspace_bytes=1).isfinite()
