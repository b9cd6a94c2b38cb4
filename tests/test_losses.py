"""Every backend's cross-entropy through the public functions, against the contract and torch."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import public
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import reference
from fastattn.testing import (
    CE_CASES,
    LINEAR_CE_CASES,
    CrossEntropyCase,
    Results,
    assert_results_close,
    cross_entropy_expected,
    cross_entropy_results,
    linear_cross_entropy_expected,
    linear_cross_entropy_results,
    make_cross_entropy_problem,
    make_linear_cross_entropy_problem,
    to_float64,
)

pytestmark = pytest.mark.emulated

# --- the shared grid ------------------------------------------------------------------------------


@functools.cache  # once for all backends
def expected_of(case: CrossEntropyCase, dtype: torch.dtype) -> tuple[Results, Results]:
    return cross_entropy_expected(make_cross_entropy_problem(case, dtype))


@functools.cache
def linear_expected_of(case: CrossEntropyCase, dtype: torch.dtype) -> tuple[Results, Results]:
    return linear_cross_entropy_expected(make_linear_cross_entropy_problem(case, dtype))


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=public.name_of)
@pytest.mark.parametrize("case", CE_CASES, ids=str)
def test_keeps_the_contract(
    backend: str, case: CrossEntropyCase, dtype: torch.dtype, poisoned: None
) -> None:
    function = functools.partial(public.cross_entropy, backend=backend)
    ours = cross_entropy_results(function, make_cross_entropy_problem(case, dtype))
    assert ours["loss"].dtype == ours["lse"].dtype == torch.float32
    assert ours["dlogits"].dtype == dtype
    assert_results_close(ours, *expected_of(case, dtype))


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=public.name_of)
@pytest.mark.parametrize("case", LINEAR_CE_CASES, ids=str)
def test_linear_keeps_the_contract(
    backend: str, case: CrossEntropyCase, dtype: torch.dtype, poisoned: None
) -> None:
    function = functools.partial(public.linear_cross_entropy, backend=backend)
    ours = linear_cross_entropy_results(function, make_linear_cross_entropy_problem(case, dtype))
    assert ours["loss"].dtype == ours["lse"].dtype == torch.float32
    assert ours["dx"].dtype == ours["dlinear_weight"].dtype == dtype
    assert_results_close(ours, *linear_expected_of(case, dtype))


@pytest.mark.parametrize("case", CE_CASES, ids=str)
def test_float64_is_the_reference_itself(case: CrossEntropyCase) -> None:
    p = to_float64(make_cross_entropy_problem(case, torch.float32))
    ours = cross_entropy_results(public.cross_entropy, p)
    for name, expected in cross_entropy_results(reference.cross_entropy, p).items():
        assert ours[name].dtype == torch.float64
        assert torch.equal(ours[name], expected), name


# --- torch's functions ----------------------------------------------------------------------------

VOCAB = 37
OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing, "weight": weighted, "ignored": ignored}
    for reduction, smoothing, weighted, ignored in itertools.product(
        ("mean", "sum", "none"), (0.0, 0.2), (False, True), ("some", "all")
    )
]


def arguments(options: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """Targets (2, 9), and the keyword arguments both libraries take."""
    target = torch.randint(VOCAB, (2, 9))
    target[:, :: 1 if options["ignored"] == "all" else 3] = 5
    weight = torch.rand(VOCAB, dtype=dtype) if options["weight"] else None
    kept = {name: options[name] for name in ("reduction", "label_smoothing")}
    return target, {**kept, "weight": weight, "ignore_index": 5}


def describe(options: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in options.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=public.name_of)
@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_cross_entropy_is_torchs(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.randn(2, 9, VOCAB, dtype=dtype, requires_grad=True)
    target, keywords = arguments(options, dtype)
    ours = fastattn.cross_entropy(logits, target, **keywords)
    theirs = F.cross_entropy(logits.flatten(0, 1), target.flatten(), **keywords)
    assert_same(ours, theirs.view_as(ours), [logits])


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch hasn't got it yet")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=public.name_of)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_linear_cross_entropy_is_torchs(
    options: dict[str, Any], bias: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 9, 8, dtype=dtype, requires_grad=True)
    w = torch.randn(VOCAB, 8, dtype=dtype, requires_grad=True)
    b = torch.randn(VOCAB, dtype=dtype, requires_grad=True) if bias else None
    target, keywords = arguments(options, dtype)
    ours = fastattn.linear_cross_entropy(
        x, w, target, linear_bias=b, workspace_bytes=7 * 4 * VOCAB, **keywords
    )
    flat = (x.flatten(0, 1), w, target.flatten())
    theirs = F.linear_cross_entropy(*flat, linear_bias=b, **keywords)
    assert_same(ours, theirs.view_as(ours), [x, w] if b is None else [x, w, b])


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    close = {"rtol": 1e-5, "atol": 1e-6} if ours.dtype == torch.float32 else {"rtol": 1e-12}
    close = {"atol": 1e-13} | close
    torch.testing.assert_close(ours, theirs, equal_nan=True, **close)
    upstream = torch.randn_like(ours)
    our_grads = torch.autograd.grad(ours, leaves, upstream)
    their_grads = torch.autograd.grad(theirs, leaves, upstream)
    for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(our_grad, their_grad, **close)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_z_loss_softcap_and_lse(backend: str, reduction: str, linear: bool) -> None:
    """What torch's functions lack, from its own parts."""
    x, w = torch.randn(11, 8), torch.randn(VOCAB, 8)
    target = torch.randint(VOCAB, (11,))
    target[::4] = -100
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    options = {"z_loss": 1e-2, "softcap": 3.0, "reduction": reduction, "backend": backend}
    if linear:
        ours = fastattn.linear_cross_entropy(*leaves, target, return_lse=True, **options)
    else:
        logits = leaves[0] @ leaves[1].T
        ours = fastattn.cross_entropy(logits, target, return_lse=True, **options)
    same = [t.double().requires_grad_() for t in (x, w)]
    z = 3 * torch.tanh(same[0] @ same[1].T / 3)
    lse = z.logsumexp(-1)
    loss = F.cross_entropy(z, target, reduction="none") + 1e-2 * lse.square() * (target != -100)
    reduced = {"mean": loss.sum() / (target != -100).sum(), "sum": loss.sum(), "none": loss}
    theirs = (reduced[reduction], lse)
    weights = [torch.randn_like(t) for t in theirs]
    grads = torch.autograd.grad(ours, leaves, [t.float() for t in weights])
    expected = torch.autograd.grad(theirs, same, weights)
    for a, b in zip([*ours, *grads], [*theirs, *expected], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_modules() -> None:
    weight = torch.rand(VOCAB)
    logits, target = torch.randn(9, VOCAB), torch.randint(VOCAB, (9,))
    ours = fastattn.CrossEntropyLoss(weight, 3, "sum", 0.1)
    assert torch.equal(ours.state_dict()["weight"], weight)
    theirs = nn.CrossEntropyLoss(weight, ignore_index=3, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))

    x = torch.randn(9, 8)
    linear = fastattn.LinearCrossEntropyLoss(8, VOCAB, bias=True, weight=weight, reduction="sum")
    theirs = nn.CrossEntropyLoss(weight, reduction="sum")
    torch.testing.assert_close(linear(x, target), theirs(linear.linear(x), target))
    assert {"weight", "linear.weight", "linear.bias"} == set(linear.state_dict())


# --- gradients ------------------------------------------------------------------------------------


def losses(backend: str | None) -> dict[str, Any]:
    """Scalar functions of logits-like leaves (6, V), one for each autograd.Function there is."""
    target = torch.tensor([1, 2, -100, 4, 5, 6])
    w = torch.linspace(-1, 1, 16 * VOCAB).view(16, VOCAB)
    options = {"backend": backend}
    return {
        "mean": lambda z: fastattn.cross_entropy(z, target, **options),
        "none": lambda z: fastattn.cross_entropy(z, target, reduction="none", **options).sum(),
        "lse": lambda z: fastattn.cross_entropy(z, target, return_lse=True, **options)[1].sum(),
        "linear": lambda z: fastattn.linear_cross_entropy(z, w, target, **options),
        "linear-none": lambda z: fastattn.linear_cross_entropy(
            z, w, target, reduction="none", **options
        ).sum(),
        "linear-lse": lambda z: fastattn.linear_cross_entropy(
            z, w, target, return_lse=True, **options
        )[1].sum(),
    }


@pytest.mark.parametrize("name", losses(None))
def test_backward_twice_through_a_retained_graph(backend: str, name: str) -> None:
    z = torch.randn(6, VOCAB, requires_grad=True)
    loss = losses(backend)[name](z)
    (first,) = torch.autograd.grad(loss, z, torch.tensor(0.5), retain_graph=True)
    (second,) = torch.autograd.grad(loss, z, torch.tensor(0.5), retain_graph=True)
    (whole,) = torch.autograd.grad(loss, z)
    assert torch.equal(first, second)
    torch.testing.assert_close(whole, 2 * first)


@pytest.mark.parametrize("name", losses(None))
def test_second_backward_names_the_backend_that_has_one(backend: str, name: str) -> None:
    z = torch.randn(6, VOCAB, requires_grad=True)
    (dz,) = torch.autograd.grad(losses(backend)[name](z), z, create_graph=True)
    if backend == "reference":
        dz.square().sum().backward()
        assert z.grad.abs().sum() > 0
    else:
        with pytest.raises(RuntimeError, match="backend='reference'"):
            dz.square().sum().backward()


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["input", "linear_weight", "linear_bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_of_one_input_only(backend: str, wanted: int, reduction: str) -> None:
    tensors = [torch.randn(6, 8), torch.randn(VOCAB, 8), torch.randn(VOCAB)]
    target = torch.randint(VOCAB, (6,))

    def grads(leaves: list[Tensor]):
        inputs = [t.clone().requires_grad_(i in leaves) for i, t in enumerate(tensors)]
        x, w, b = inputs
        loss = fastattn.linear_cross_entropy(
            x, w, target, linear_bias=b, reduction=reduction, backend=backend
        )
        return torch.autograd.grad(loss.sum(), [inputs[i] for i in leaves])

    assert torch.equal(grads([wanted])[0], grads([0, 1, 2])[wanted])


def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    function = torch.ops.fastattn.linear_cross_entropy_fwd_bwd

    def spy(*args):
        result = function(*args)
        sizes.append([t.numel() for t in result[1:]])
        return result

    monkeypatch.setattr(torch.ops.fastattn, "linear_cross_entropy_fwd_bwd", spy)
    x, w, b = torch.randn(6, 8), torch.randn(VOCAB, 8), torch.randn(VOCAB)
    target = torch.randint(VOCAB, (6,))
    for leaf in (x, w, b):
        leaf.requires_grad_()
        fastattn.linear_cross_entropy(x, w, target, linear_bias=b).backward()
        leaf.requires_grad_(False)
    assert sizes == [[48, 0, 0], [0, 8 * VOCAB, 0], [0, 0, VOCAB]]


# --- the gradient in the logits' memory -----------------------------------------------------------


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=public.name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_inplace_leaves_the_gradient_in_the_logits(
    dtype: torch.dtype, reduction: str, upstream: float
) -> None:
    logits, target = torch.randn(2, 9, VOCAB, dtype=dtype), torch.randint(VOCAB, (2, 9))
    grads, results = [], []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        z = leaf * 1.0
        loss = fastattn.cross_entropy(z, target, reduction=reduction, inplace=inplace)
        (upstream * loss).backward()
        grads.append(leaf.grad)
        results.append(loss.detach())
    assert torch.equal(*results)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*grads, rtol=8 * eps, atol=1e-8)
    if upstream == 1:
        assert torch.equal(z.detach(), leaf.grad)


@pytest.mark.parametrize("name", losses(None))
def test_gradients_survive_what_is_done_to_those_of_a_backward_before(name: str) -> None:
    z = torch.randn(6, VOCAB, requires_grad=True)
    loss = losses(None)[name](z)
    loss.backward(retain_graph=True)
    before = z.grad.clone()
    z.grad.zero_()
    loss.backward()
    assert torch.equal(z.grad, before)


@pytest.mark.parametrize("dtype", public.KERNEL_DTYPES, ids=public.name_of)
def test_loss_scale_lifts_gradients_that_float16_would_lose(dtype: torch.dtype) -> None:
    z = torch.randn(4096, 64, dtype=dtype, requires_grad=True)
    target = torch.randint(64, (4096,))
    (fastattn.cross_entropy(z, target) * 2.0**16).backward()
    expected = z.detach().double().requires_grad_()
    (torch.nn.functional.cross_entropy(expected, target) * 2.0**16).backward()
    torch.testing.assert_close(
        z.grad.double(), expected.grad, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=0
    )


def test_inplace_has_one_backward() -> None:
    z = torch.randn(6, VOCAB, requires_grad=True)
    loss = fastattn.cross_entropy(z * 1.0, torch.arange(6), inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace cross_entropy has one backward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="inplace cross_entropy has one backward"):
        z = torch.randn(6, VOCAB, requires_grad=True)
        loss = fastattn.cross_entropy(z * 1.0, torch.arange(6), inplace=True)
        torch.autograd.grad(loss, z, create_graph=True)


def test_inplace_touches_logits_only_for_a_gradient(backend: str) -> None:
    logits = torch.randn(6, VOCAB)
    before = logits.clone()
    fastattn.cross_entropy(logits, torch.arange(6), inplace=True, backend=backend)
    assert torch.equal(logits, before)
    with torch.no_grad():
        leaf = logits.requires_grad_()
        fastattn.cross_entropy(leaf, torch.arange(6), inplace=True, backend=backend)
    assert torch.equal(logits, before)


def test_inplace_refuses_what_it_cant_overwrite() -> None:
    target = torch.arange(6)
    overlapping = torch.randn(1, VOCAB).expand(6, VOCAB).requires_grad_()
    scattered = torch.randn(VOCAB, 6).T.requires_grad_()
    for logits in (overlapping, scattered):
        with pytest.raises(ValueError, match="inplace needs logits that can be viewed"):
            fastattn.cross_entropy(logits, target, inplace=True)
    with pytest.raises(ValueError, match="inplace needs reduction"):
        fastattn.cross_entropy(torch.randn(6, VOCAB), target, reduction="none", inplace=True)


def test_inplace_with_all_targets_ignored() -> None:
    leaf = torch.randn(6, VOCAB, requires_grad=True)
    loss = fastattn.cross_entropy(leaf * 1.0, torch.full((6,), -100), inplace=True)
    loss.backward()
    assert loss.isnan() and not leaf.grad.any()


# --- hard cases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "linear"])
def test_mean_over_no_valid_row(backend: str, name: str) -> None:
    z = torch.randn(6, 16, requires_grad=True)
    target = torch.full((6,), -100)
    if name == "linear":
        loss = fastattn.linear_cross_entropy(z, torch.randn(VOCAB, 16), target, backend=backend)
    else:
        loss = fastattn.cross_entropy(z, target, backend=backend)
    loss.backward()
    assert loss.isnan() and not z.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(backend: str, reduction: str) -> None:
    z = torch.randn(0, 16, requires_grad=True)
    w = torch.randn(VOCAB, 16, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64)
    options = {"reduction": reduction, "backend": backend}
    expected = F.cross_entropy(z, target, reduction=reduction)
    torch.testing.assert_close(
        fastattn.cross_entropy(z, target, **options), expected, equal_nan=True
    )
    loss = fastattn.linear_cross_entropy(z, w, target, **options)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    assert z.grad.shape == z.shape and not w.grad.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_bad_logits_spoil_their_row_only(backend: str, value: float) -> None:
    z = torch.randn(4, VOCAB)
    z[1, 3] = value
    target = torch.tensor([1, 2, 3, 4])
    leaf, same = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = fastattn.cross_entropy(leaf, target, reduction="none", backend=backend)
    expected = F.cross_entropy(same, target, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad, same.grad, equal_nan=True)


def test_infinite_target_logit(backend: str) -> None:
    """A target class masked to −inf: infinite loss, as in eager."""
    z = torch.randn(2, VOCAB)
    z[0, 5] = -math.inf
    loss = fastattn.cross_entropy(z, torch.tensor([5, 5]), reduction="none", backend=backend)
    assert loss[0] == math.inf and loss[1].isfinite()


def test_logits_of_any_strides(backend: str) -> None:
    target = torch.randint(VOCAB, (4, 3))
    for z in (
        torch.randn(4, VOCAB, 3).mT,
        torch.randn(3, 4, VOCAB).transpose(0, 1),
        torch.randn(1, 1, VOCAB).expand(4, 3, VOCAB),
        torch.randn(4, 3, 2 * VOCAB)[..., ::2],
    ):
        got, same = z.requires_grad_(), z.detach().contiguous().requires_grad_()
        results = []
        for x in (got, same):
            loss = fastattn.cross_entropy(x, target, reduction="none", backend=backend)
            results.append((loss, *torch.autograd.grad(loss.sum(), x)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_one_row_of_logits(backend: str) -> None:
    z = torch.randn(VOCAB)
    loss = fastattn.cross_entropy(z, torch.tensor(3), backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(z, torch.tensor(3)))


def test_offsets_past_2_to_31_elements(backend: str) -> None:
    try:
        memory = torch.empty(2**31 + 2 * VOCAB, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    far = memory.as_strided((2, VOCAB), (2**31 + 5, 1))
    far.copy_(torch.randn(2, VOCAB))
    loss = fastattn.cross_entropy(far, torch.tensor([1, 2]), backend=backend)
    same = fastattn.cross_entropy(far.contiguous(), torch.tensor([1, 2]), backend=backend)
    assert torch.equal(loss, same)


@pytest.mark.parametrize("wide", [torch.float64, torch.bfloat16], ids=public.name_of)
def test_class_weights_of_another_dtype(backend: str, wide: torch.dtype) -> None:
    z, target = torch.randn(6, VOCAB), torch.randint(VOCAB, (6,))
    weight = torch.rand(VOCAB).to(wide)
    loss = fastattn.cross_entropy(z, target, weight, backend=backend)
    assert torch.equal(loss, fastattn.cross_entropy(z, target, weight.float(), backend=backend))


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_narrows_the_inputs_and_nothing_else(reduction: str) -> None:
    """The products inside stay fp32: results are those of narrow inputs without autocast."""
    x, w = torch.randn(6, 8), torch.randn(VOCAB, 8)
    target = torch.randint(VOCAB, (6,))
    results = []
    for cast in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        inputs = leaves if cast else [t.bfloat16() for t in leaves]
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = fastattn.linear_cross_entropy(*inputs, target, reduction=reduction).sum()
            loss.backward()
        assert loss.dtype == torch.float32
        results.append((loss, *(t.grad for t in leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_autocast_leaves_float64_alone() -> None:
    x, w = torch.randn(6, 8, dtype=torch.float64), torch.randn(VOCAB, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.linear_cross_entropy(x, w, torch.arange(6)).dtype == torch.float64


def test_autocast_of_logits() -> None:
    z, target = torch.randn(6, VOCAB), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastattn.cross_entropy(z, target)
    assert torch.equal(loss, fastattn.cross_entropy(z, target))
