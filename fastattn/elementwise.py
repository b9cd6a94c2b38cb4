"""RMSNorm and the MLP's activations with gradients written by hand: fewer passes, less kept.

Autograd keeps an input for each operation, and torch has no kernel of its own for RMSNorm on the
CPU. The gradients here are made of differentiable operations, so they can be differentiated again.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import linear

Activation = Literal["gelu", "relu2", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last axis (Zhang & Sennrich, "RMSNorm", 2019).

    x (…, C), weight (C,) or None, which is 1. Computed in fp32 at least, returned in x's dtype.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # torch has, or makes, one kernel
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    accumulator = torch.promote_types(x.dtype, torch.float32)
    normed = _RMSNormalize.apply(x.to(accumulator), eps)[0]
    return (normed if weight is None else normed * weight).to(x.dtype)


class _RMSNormalize(torch.autograd.Function):
    """x (…, C), eps give y = r x with r = 1 / √(mean(x²) + eps), and r (…, 1)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        mean_square = torch.linalg.vecdot(x, x).unsqueeze(-1) / x.shape[-1]
        r = torch.rsqrt(mean_square + eps)
        return x * r, r

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dy: Tensor | None, dr: Tensor | None) -> tuple[Tensor, None]:
        """dx = r (dy − y mean(dy y)) − r² y dr / C; only a second backward has a dr."""
        y, r = ctx.saved_tensors
        if dy is None:
            dx = torch.zeros_like(y)
        else:
            mean = torch.linalg.vecdot(dy, y).unsqueeze(-1) / y.shape[-1]
            dx = torch.addcmul(dy, y, mean, value=-1) * r
        if dr is not None:
            dx = dx - r * r * y * dr / y.shape[-1]
        return dx, None


def activation_linear(
    name: Activation,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """activation(h) @ weightᵀ + bias, keeping h alone: the activation is computed again.

    h (…, n_inner), for "swiglu" (…, 2 n_inner); weight (C, n_inner); gives (…, C). At GPT-2's
    sizes the activation would be a quarter of all that a block keeps. `backend` as in `linear`.
    """
    return _ActivationLinear.apply(name, h, weight, bias, backend)


class _ActivationLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        name: Activation, h: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None
    ) -> Tensor:
        return linear(activate(name, h), weight, bias, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.name, h, weight, bias, ctx.backend = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(h, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor, Tensor, Tensor | None, None]:
        h, weight = ctx.saved_tensors
        # Under autocast dy is bf16 and the weight fp32.
        da = linear(dy, weight.to(dy.dtype).mT, backend=ctx.backend)
        dh, a = _activation_backward(ctx.name, h, da)
        rows = dy.flatten(0, -2)
        dweight = linear(rows.mT, a.flatten(0, -2).mT, backend=ctx.backend)
        dbias = rows.sum(0).to(weight.dtype) if ctx.has_bias else None
        return None, dh, dweight.to(weight.dtype), dbias, None


def activate(name: Activation, h: Tensor) -> Tensor:
    """The activation alone: GELU in its tanh form, ReLU², or SiLU(h's first half) · its second."""
    if name == "gelu":
        return F.gelu(h, approximate="tanh")
    if name == "relu2":
        r = F.relu(h)
        return r * r
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


def _activation_backward(name: Activation, h: Tensor, da: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of h, and the activation a."""
    if name == "gelu":
        dh = torch.ops.aten.gelu_backward(da, h, approximate="tanh")
        return dh, F.gelu(h, approximate="tanh")
    if name == "relu2":
        r = F.relu(h)
        return 2 * da * r, r * r
    gate, value = h.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)  # of SiLU
    return torch.cat((da * value * slope, da * silu), dim=-1), silu * value
