"""Linear layers by our own products against fp64 and torch's, and who takes which."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastattn import backends, library
from fastattn.elementwise import activation_linear
from fastattn.gpt import GPT, GPTConfig
from fastattn.linear import Linear, linear

module = importlib.import_module("fastattn.linear")
pytestmark = pytest.mark.skipif(
    library.load_error() is not None, reason="the kernels are not built"
)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Our own products, on whatever processor and for whatever size; the shapes they were given."""
    from fastattn.backend_cpu import OwnProducts

    class Watched(OwnProducts):
        def multiply(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
            shapes.append((*a.shape, b.shape[1]))
            super().multiply(a, b, out, accumulate)

    shapes: list[tuple[int, ...]] = []
    own = lambda device, backend: None if backend == "reference" else Watched()  # noqa: E731
    monkeypatch.setattr(backends, "own_products", own)
    monkeypatch.setattr(module, "LEAST_SIZE", 0)
    monkeypatch.setattr(module, "LEAST_PRODUCTS", 0)
    return shapes


def leaves(*shape: int, n: int, bias: bool = True) -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(shape) + n)
    shapes = [shape, (n, shape[-1])] + ([(n,)] if bias else [])
    return [torch.randn(s, generator=g, requires_grad=True) for s in shapes]


def gradients(out: Tensor, of: list[Tensor], dout: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, of, dout.to(out.dtype))]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 2, 33), (130, 65), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("n", [1, 17, 130])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_as_exact_as_torchs(shape: tuple[int, ...], n: int, bias: bool, ours: list) -> None:
    args = leaves(*shape, n=n, bias=bias)
    dout = torch.randn(*shape[:-1], n)
    exact_args = [a.detach().double().requires_grad_() for a in args]
    exact = gradients(F.linear(*exact_args), exact_args, dout)
    want = gradients(F.linear(*args), args, dout)
    got = gradients(linear(*args), args, dout)
    m = dout.numel() // n
    assert ours == [(m, shape[-1], n), (m, n, shape[-1]), (n, m, shape[-1])]
    for a, b, c in zip(got, want, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        rounding = 1e-6 * (1 + float(c.abs().amax() if c.numel() else 0))
        assert ((a - c).abs() <= 2 * (b - c).abs().amax() + rounding if c.numel() else a == c).all()


def test_any_strides(ours: list) -> None:
    x = torch.randn(6, 4, 40)[:, ::2, ::2].transpose(0, 1).requires_grad_()
    weight = torch.randn(20, 30).t()[::2, :].requires_grad_()
    bias = torch.randn(1).expand(15).requires_grad_()
    dout = torch.randn(15, 2, 6).permute(1, 2, 0)
    for got, want in zip(
        gradients(linear(x, weight, bias), [x, weight, bias], dout),
        gradients(F.linear(x, weight, bias), [x, weight, bias], dout),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert len(ours) == 3


def test_a_sum_has_a_gradient_without_strides(ours: list) -> None:
    x, weight, bias = leaves(9, 12, n=5)
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(9, 12))
    torch.testing.assert_close(bias.grad, torch.full((5,), 9.0))


def test_only_wanted_gradients_are_computed(ours: list) -> None:
    x, weight, bias = leaves(9, 12, n=5)
    linear(x.detach(), weight, bias).sum().backward()
    assert ours == [(9, 12, 5), (5, 9, 12)]
    with torch.inference_mode():
        linear(x, weight, bias)


def test_gradients_have_gradients(ours: list) -> None:
    args = leaves(6, 9, n=4)
    dout = torch.randn(6, 4, requires_grad=True)

    def second(f) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(f(*args), args, dout, create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in first), [*args[:2], dout])

    for got, want in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_operator(ours: list) -> None:
    x, weight, bias = (t.detach() for t in leaves(6, 9, n=4))
    for backend in (None, "cpu", "reference"):
        for b in (bias, None):
            arguments = (x, weight, b, backend)
            torch.testing.assert_close(
                torch.ops.fastattn.linear(*arguments), F.linear(x, weight, b)
            )
            opcheck(
                torch.ops.fastattn.linear.default,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )


def test_compiles_whole_and_checkpoints(ours: list) -> None:
    torch._dynamo.reset()
    x, weight, bias = leaves(3, 8, 16, n=16)

    def loss(x: Tensor) -> Tensor:
        h = linear(x, weight, bias)
        return activation_linear("gelu", h, weight, bias).square().sum()

    def step(f) -> list[Tensor]:
        value = f(x)
        return [value, *torch.autograd.grad(value, [x, weight, bias])]

    want = step(loss)
    ours.clear()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for f in (compiled, lambda x: checkpoint(loss, x, use_reentrant=False)):
        for got, expected in zip(step(f), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert len(ours) >= 6
        ours.clear()


def test_under_function_transforms(ours: list) -> None:
    x, weight, bias = (t.detach() for t in leaves(3, 4, 6, n=5))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, bias).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, weight)
    rows = [torch.func.grad(loss, argnums=(0, 1))(row, weight) for row in x]
    assert ours
    for g, want in zip(got, zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(want))


def test_what_is_left_to_torch(ours: list, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = (t.detach() for t in leaves(6, 9, n=4))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    linear(x.bfloat16(), weight.bfloat16())
    linear(x.double(), weight.double())
    linear(x[0], weight, bias)
    linear(x, weight, bias, backend="reference")
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight.double())
    with pytest.raises(RuntimeError, match="shape"):
        linear(x, weight[:, :5])
    assert ours == []
    monkeypatch.setattr(module, "LEAST_SIZE", 8)
    linear(x, weight, bias)  # too few rows
    assert ours == []


def test_own_products_are_the_asked_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for isa, expected in (("avx512_bf16", True), ("avx512", False), ("avx2", False)):
        monkeypatch.setattr(library, "cpu_isa", lambda isa=isa: isa)
        assert (backends.own_products(cpu, None) is not None) is expected
        assert (backends.own_products(cpu, "cpu") is not None) is expected
        assert backends.own_products(cpu, "reference") is None
        assert backends.own_products(torch.device("meta"), None) is None
    monkeypatch.setattr(library, "cpu_isa", lambda: "avx512_bf16")
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert backends.own_products(cpu, None) is None
    monkeypatch.delenv("FASTATTN_BACKEND")
    monkeypatch.setattr(library, "load_error", lambda: "there is no library")
    assert backends.own_products(cpu, None) is None
    with pytest.raises(ValueError, match="is no backend"):
        backends.own_products(cpu, "cpus")


def test_a_gpt_asks_the_same_backend_for_its_products(ours: list) -> None:
    config = GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16)
    model, idx = GPT(config), torch.randint(11, (2, 8))
    model(idx, backend="reference")
    model(idx, idx, backend="reference").backward()
    assert ours == []
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    seen: list[torch.nn.Module] = []
    for layer in layers:
        layer.register_forward_hook(lambda m, *_: seen.append(m))
    out = model(idx)
    assert len(ours) == 5  # four layers and the head
    assert [type(m) for m in seen] == [Linear] * 3  # all but mlp.c_proj, which is fused
    torch.testing.assert_close(out, model(idx, backend="reference"), rtol=1e-4, atol=1e-5)
