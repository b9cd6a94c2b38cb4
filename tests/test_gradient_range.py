"""fp16 linear cross-entropy by tensor cores, whose products take the logits' gradient in fp16."""

from __future__ import annotations

import math
from collections.abc import Iterator

import out_dtype
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastattn import backends, chunked_loss, gradient_range, reference
from fastattn.losses import LinearCrossEntropyFunction, LinearCrossEntropyScalarFunction
from fastattn.problem import LinearCrossEntropyProblem
from fastattn.products import TensorCoreProducts
from fastattn.testing import (
    LINEAR_CE_CASES,
    CrossEntropyCase,
    check_linear_cross_entropy,
    eager_linear_cross_entropy,
    make_linear_cross_entropy_problem,
    to_float64,
)

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Theirs are the products, and the reference is the kernel between them."""
    monkeypatch.setattr(backends.Backend, "products", lambda row, device: TensorCoreProducts())
    with out_dtype.on_cpu():
        yield


def three_rows(p: LinearCrossEntropyProblem) -> int:
    """Bytes for chunks of three rows."""
    return 3 * 6 * p.linear_weight.shape[0]


def rowwise(p: LinearCrossEntropyProblem) -> tuple[Tensor, Tensor]:
    return LinearCrossEntropyFunction.run(*p, three_rows(p), "reference")


def gradients(p: LinearCrossEntropyProblem, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, dbias of scale · Σ loss."""
    with_bias = p.linear_bias is not None
    return chunked_loss.forward_backward(
        p, scale, True, True, with_bias, three_rows(p), "reference"
    )[1:]


def exact_gradients(p: LinearCrossEntropyProblem, scale: float) -> list[Tensor]:
    """The same in float64."""
    p = to_float64(p)
    dlogits = exact_dlogits(p, scale)
    return [dlogits @ p.linear_weight, dlogits.T @ p.x, dlogits.sum(0)]


def exact_dlogits(p: LinearCrossEntropyProblem, scale: float) -> Tensor:
    logits = F.linear(p.x, p.linear_weight, p.linear_bias).requires_grad_()
    loss, _ = reference.cross_entropy(p.of_logits(logits, slice(None)))
    return torch.autograd.grad(scale * loss.sum(), logits)[0]


def plain(rows: int, vocab: int, channels: int = 16, spread: float = 1.0, **options):
    case = CrossEntropyCase("", rows, vocab, ignored=0.0, spread=spread)
    p = make_linear_cross_entropy_problem(case, torch.float16, channels=channels, bias=False)
    return p._replace(**options)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR_CE_CASES, ids=str)
def test_row_by_row_it_keeps_the_bound(case: CrossEntropyCase, dtype: torch.dtype) -> None:
    check_linear_cross_entropy(rowwise, make_linear_cross_entropy_problem(case, dtype))


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["everything", "vocab-1000"])
def test_every_kernel_for_gpus_rounds_it(
    backend: str, name: str, dtype: torch.dtype, poisoned: None
) -> None:
    if backend == "cpu":
        pytest.skip("the CPU's kernels leave fp16 to fp32 products")
    (case,) = (case for case in LINEAR_CE_CASES if case.name == name)
    p = make_linear_cross_entropy_problem(case, dtype)
    check_linear_cross_entropy(
        lambda p: LinearCrossEntropyFunction.run(*p, three_rows(p), backend), p
    )


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**40])
@pytest.mark.parametrize("case", LINEAR_CE_CASES, ids=str)
def test_gradients_of_the_sum_are_rounded_once(case: CrossEntropyCase, scale: float) -> None:
    """Each element of the logits' gradient is wrong by 2⁻¹¹ of itself, and the sums by no more."""
    p = make_linear_cross_entropy_problem(case, torch.float16)
    exact, q = exact_gradients(p, scale), to_float64(p)
    sizes = exact_dlogits(q, scale).abs()
    sums = (sizes @ q.linear_weight.abs(), sizes.T @ q.x.abs(), sizes.sum(0))
    for ours, theirs, size in zip(gradients(p, torch.tensor(scale)), exact, sums, strict=True):
        least = 2.0**-24 * size.max() if size.numel() else 0.0  # of the fp32 inside
        assert ((ours.double() - theirs).abs() <= 1.01 * 2.0**-11 * size + least).all()


def test_as_small_as_those_of_many_classes() -> None:
    """Nearly uniform over 50,000: 2·10⁻⁵ a class, 2·10⁻⁹ in a mean over 10,000 rows."""
    p = plain(8, 50_000, spread=0.01)
    scale = 1e-4
    dx, dw, _ = gradients(p, torch.tensor(scale))
    exact_dx, exact_dw, _ = exact_gradients(p, scale)
    assert relative(dx, exact_dx) < 2.0**-10
    missed = torch.ones(50_000, dtype=torch.bool)
    missed[p.target] = False
    assert exact_dw[missed].abs().max() < 2.0**-25  # half of fp16's smallest number
    assert relative(dw[missed], exact_dw[missed]) < 2.0**-10


def test_rows_of_other_sizes_and_none() -> None:
    """Upstream gradients of 2 and 10⁻³, and of 0, which leaves no trace."""
    p = plain(12, 300)
    dloss = torch.tensor([0.0, 2.0, -1e-3] * 4)
    dx, dw, _ = rows_gradients(p, dloss)
    q = to_float64(p)
    leaves = [q.x.requires_grad_(), q.linear_weight.requires_grad_()]
    exact_dx, exact_dw = torch.autograd.grad(
        eager_linear_cross_entropy(q)[0], leaves, dloss.double()
    )
    assert (dx[::3] == 0).all()
    assert relative(dx, exact_dx) < 2.0**-10 and relative(dw, exact_dw) < 2.0**-10
    assert relative(dx[2::3], exact_dx[2::3]) < 2.0**-10


def rows_gradients(
    p: LinearCrossEntropyProblem, dloss: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    lse = rowwise(p)[1]
    return chunked_loss.backward(p, lse, dloss, dlse, three_rows(p), "reference")


def test_no_gradient_at_all() -> None:
    p = plain(6, 50)
    for dlse in (None, torch.zeros(6)):
        assert all((g == 0).all() for g in rows_gradients(p, torch.zeros(6), dlse))
    assert all((g == 0).all() for g in gradients(p, torch.zeros(())))
    ignored = p._replace(target=torch.full_like(p.target, -100))
    assert all((g == 0).all() for g in gradients(ignored, torch.tensor(math.inf)))  # a mean's
    assert all((g == 0).all() for g in rows_gradients(ignored, torch.ones(6)))


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_an_infinite_loss_scale_is_seen(z_loss: float) -> None:
    """A loss scaler skips the step where it finds an infinity or NaN."""
    p = plain(7, 50, z_loss=z_loss)
    assert not any(g.isfinite().all() for g in gradients(p, torch.tensor(math.inf))[:2])
    dloss = torch.ones(7)
    dloss[2] = math.inf
    dx, dw, _ = rows_gradients(p, dloss)
    assert not dx[2].isfinite().any() and not dw.isfinite().all()
    others = torch.arange(7) != 2
    dloss[2] = 0.0
    assert torch.equal(dx[others], rows_gradients(p, dloss)[0][others])


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
def test_rows_that_are_ignored_may_hold_anything(z_loss: float) -> None:
    p = plain(7, 50, z_loss=z_loss)
    p.target[2] = -100
    dx, _, _ = gradients(p, torch.ones(()))
    p.x[2] = 60000.0
    got, dw, _ = gradients(p, torch.ones(()))
    assert torch.equal(got, dx) and dw.isfinite().all()
    dx, _, _ = rows_gradients(p, torch.ones(7))
    p.x[2, 0] = math.nan
    assert torch.equal(rows_gradients(p, torch.ones(7))[0], dx)


@pytest.mark.parametrize("seed", range(40))
def test_no_element_leaves_the_range(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However weights, smoothing, z-loss and softcap conspire; and most of it is used."""
    g = torch.Generator().manual_seed(seed)

    def draw(*choices: float) -> float:
        return choices[int(torch.randint(len(choices), (), generator=g))]

    vocab, spread = int(draw(1, 2, 3, 50)), draw(0.1, 5.0, 30.0)
    case = CrossEntropyCase(
        "", 20, vocab, label_smoothing=draw(0.0, 0.3, 1.0), z_loss=draw(0.0, 1e-4, 1.0),
        softcap=draw(0.0, 10.0), spread=spread,
    )  # fmt: skip
    p = make_linear_cross_entropy_problem(case, torch.float16, seed)
    if draw(0.0, 1.0):
        p = p._replace(weight=draw(1e-3, 1.0, 1e3) * torch.randn(vocab, generator=g))
    held = record_gradients(monkeypatch)
    gradients(p, torch.tensor(draw(1e-6, 1.0, 65536.0)))
    dloss, dlse = torch.randn(2, 20, generator=g) * draw(1e-3, 1.0)
    rows_gradients(p, dloss, dlse)
    assert all(t.dtype == torch.float16 and t.isfinite().all() for t in held)
    assert max(float(t.abs().max()) for t in held) <= 1.5 * gradient_range.LARGEST


def record_gradients(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Copies of the logits' gradients that products are made of from now on."""
    held: list[Tensor] = []

    def add(self, chunk: chunked_loss._Chunk) -> None:
        held.append(chunk.dlogits.clone())
        added(self, chunk)

    added = chunked_loss._Gradients.add
    monkeypatch.setattr(chunked_loss._Gradients, "add", add)
    return held


def test_a_wrong_guess_takes_up_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    p = plain(6, 50, spread=20.0)
    held = record_gradients(monkeypatch)
    gradients(p, torch.tensor(1 / 6))
    assert max(float(t.abs().max()) for t in held) > 0.9 * gradient_range.LARGEST


def test_nothing_waits_for_the_device() -> None:
    """Fake tensors have no values to wait for."""
    with FakeTensorMode():
        p = LinearCrossEntropyProblem(
            torch.empty(8, 4).half(), torch.empty(9, 4).half(), torch.empty(9).half(),
            torch.empty(8, dtype=torch.int64), torch.empty(9), z_loss=1e-4,
        )  # fmt: skip
        rows = torch.empty(8)
        for arguments in ((rows[0],), (rows, rows, rows)):
            unit = gradient_range.unit(p, *arguments)
            assert unit.shape == () and unit.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradients_memory_is_part_of_the_workspace(dtype: torch.dtype) -> None:
    p = plain(64, 50)
    p = p._replace(x=p.x.to(dtype), linear_weight=p.linear_weight.to(dtype))
    budget = 10 * 50 * 6
    chunks = chunked_loss._Chunks(p, TensorCoreProducts(), budget, gradients=True)
    assert chunks.size == 10 and chunks.dlogits.dtype == dtype
    assert chunks.dlogits.data_ptr() != chunks.logits.data_ptr()
    assert chunked_loss._Chunks(p, TensorCoreProducts(), budget).size == 13  # of at most 15


def test_a_loss_scaler_trains_with_it() -> None:
    """Gradients of the scaled mean, which is scaled back in the weights' gradients."""
    p = plain(30, 400)
    leaves = [p.x.clone().requires_grad_(), p.linear_weight.clone().requires_grad_()]
    q = p._replace(x=leaves[0], linear_weight=leaves[1])
    loss = LinearCrossEntropyScalarFunction.run(
        *q, torch.tensor(1 / 30), True, True, False, three_rows(p), "reference"
    )[0]
    (loss * 2.0**16).backward()
    for leaf, exact in zip(leaves, exact_gradients(p, 2.0**16 / 30), strict=False):
        assert leaf.grad is not None and leaf.grad.dtype == torch.float16
        assert relative(leaf.grad, exact) < 2.0**-10
