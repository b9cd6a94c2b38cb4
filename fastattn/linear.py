"""Linear layers by the backend's own matrix products, where torch's are slow.

On AMD's AVX-512 processors torch's fp32 product (MKL's) reaches half of what the processor can do,
and the CPU kernels' own is twice as fast. Anywhere else, and for all but fp32, this is `F.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends
from .autograd import FusedFunction
from .when_imported import when_imported

# The least rows, columns and summed elements, and the least product of the three, for which a
# Function around our own product pays: below, torch's is as fast (measured on Zen 5).
LEAST_SIZE = 8
LEAST_PRODUCTS = 1 << 22


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """`F.linear`: x (…, K) @ weight (N, K)ᵀ + bias (N,), of any strides, twice differentiable.

    `backend` "reference", or a GPU's, leaves it to torch, as does what torch does as fast.
    """
    if not _is_ours(x, weight, bias, backend):
        return F.linear(x, weight, bias)
    out = LinearFunction.run(x.flatten(0, -2), weight, bias, backend)
    return out.unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """`nn.Linear` by `linear`: forward takes a `backend` too."""

    def forward(self, input: Tensor, backend: str | None = None) -> Tensor:
        return linear(input, self.weight, self.bias, backend=backend)


class LinearFunction(FusedFunction):
    """x (M, K), weight (N, K), bias (N,) or None, backend; the gradients are `linear`'s again."""

    @staticmethod
    def forward(*args):
        return torch.ops.fastattn.linear(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = linear(dy, weight.mT, backend=ctx.backend)
        if ctx.needs_input_grad[1]:
            dweight = linear(dy.mT, x.mT, backend=ctx.backend)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias, None


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> bool:
    """False also for what torch has to complain of."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return False
    if x.dim() < 2 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        return False
    n, k = weight.shape
    if bias is not None and bias.shape != (n,):
        return False
    if min(n, k) < LEAST_SIZE or x.numel() < LEAST_SIZE * k or x.numel() * n < LEAST_PRODUCTS:
        return False
    return not torch.is_autocast_enabled("cpu") and _has_own_products(backend)


def _has_own_products(backend: str | None) -> bool:
    return backends.own_products(torch.device("cpu"), backend) is not None


# torch.compile asks once. As a decorator this would import all of its tracer.
when_imported("torch._dynamo", lambda: torch.compiler.assume_constant_result(_has_own_products))
