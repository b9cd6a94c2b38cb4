"""RMSNorm and activations against torch's own, their gradients by finite differences."""

import pytest
import torch
import torch.nn.functional as F

from fastattn.elementwise import activate, activation_linear, rms_norm

each_activation = pytest.mark.parametrize("name", ["gelu", "relu2", "swiglu"])


def wide(name, n):
    return 2 * n if name == "swiglu" else n


@pytest.mark.parametrize("shape", [(7,), (3, 24), (2, 5, 3, 16)], ids=str)
@pytest.mark.parametrize("with_weight", [True, False])
def test_rms_norm_is_torchs(shape, with_weight):
    x = (torch.randn(shape) * 3).requires_grad_()
    weight = torch.rand(shape[-1], requires_grad=True) if with_weight else None
    got, want = rms_norm(x, weight, 1e-3), F.rms_norm(x, shape[-1:], weight, 1e-3)
    torch.testing.assert_close(got, want)
    leaves, dout = [x, weight] if with_weight else [x], torch.randn(shape)
    for a, b in zip(
        torch.autograd.grad(got, leaves, dout),
        torch.autograd.grad(want, leaves, dout),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_strided_and_of_zero_rows():
    x = torch.randn(4, 6, 10)[:, 1:4, ::2]
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (5,), eps=1e-5))
    zeros = torch.zeros(2, 5, requires_grad=True)
    y = rms_norm(zeros)
    y.sum().backward()
    assert (y == 0).all() and zeros.grad.isfinite().all()


def test_rms_norm_in_bf16_is_the_fp32_one_rounded():
    x, weight = torch.randn(9, 64).bfloat16(), torch.rand(64).bfloat16()
    assert torch.equal(rms_norm(x, weight), rms_norm(x.float(), weight.float()).bfloat16())


def test_rms_norm_differentiates_twice():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(rms_norm, (x, weight))
    torch.autograd.gradgradcheck(rms_norm, (x, weight))


@each_activation
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_activation_linear_differentiates_twice(name, bias):
    h = torch.randn(2, 3, wide(name, 4), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    leaves = [h, weight]
    if bias:
        leaves.append(torch.randn(5, dtype=torch.float64, requires_grad=True))
    got = activation_linear(name, *leaves)
    torch.testing.assert_close(got, F.linear(activate(name, h), *leaves[1:]))
    torch.autograd.gradcheck(lambda *x: activation_linear(name, *x), leaves)
    torch.autograd.gradgradcheck(lambda *x: activation_linear(name, *x), leaves)


@each_activation
def test_activation_linear_keeps_its_input_alone(name):
    h = torch.randn(6, wide(name, 32), requires_grad=True)
    weight = torch.randn(8, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        activation_linear(name, h, weight)
    assert {t.data_ptr() for t in kept} == {h.data_ptr(), weight.data_ptr()}


@each_activation
def test_activation_linear_under_autocast(name):
    h = torch.randn(6, wide(name, 32)).bfloat16().requires_grad_()
    weight, bias = torch.randn(8, 32, requires_grad=True), torch.randn(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = activation_linear(name, h, weight, bias)
        want = F.linear(activate(name, h), weight, bias)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    leaves, dout = [h, weight, bias], torch.randn_like(out)
    for leaf, got, expected in zip(
        leaves,
        torch.autograd.grad(out, leaves, dout),
        torch.autograd.grad(want, leaves, dout),
        strict=True,
    ):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-1)


@each_activation
def test_activation_linear_under_function_transforms(name):
    h, weight = torch.randn(3, 4, wide(name, 6)), torch.randn(5, 6)

    def loss(h):
        return activation_linear(name, h, weight).square().sum()

    got = torch.func.vmap(torch.func.grad(loss))(h)
    want = torch.stack([torch.func.grad(loss)(row) for row in h])
    torch.testing.assert_close(got, want)
