"""The specification of the losses: cross-entropy in eager PyTorch, alone and behind a linear layer.

fp16, bf16 and fp32 are computed in fp32, fp64 in fp64. The losses are differentiable by autograd
any number of times; `cross_entropy_backward` is the same gradient written out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .problem import CrossEntropyProblem
from .validate import accumulator_dtype

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Keeps an ambient autocast away from the fp32 products; the first tensor tells the device."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


@without_autocast
def cross_entropy(p: CrossEntropyProblem) -> tuple[Tensor, Tensor]:
    """Loss (N,), 0 on ignored rows, and lse (N,) of every row; fp32, or fp64 for fp64 logits.

    With z the softcapped logits, y the target, m = max(z) and nll_c = log Σ exp(z − m) − (z_c − m),
    not lse − z_c, which cancels at large offsets:
    loss = (1 − ε) w_y nll_y + ε/V Σ_c w_c nll_c + z_loss · lse².
    """
    z, _ = _capped_logits(p)
    row_max = z.detach().amax(-1, keepdim=True)
    shifted = z - row_max
    log_sum = shifted.exp().sum(-1).log()
    lse = log_sum + row_max[:, 0]

    ignored = p.target == p.ignore_index
    target = p.target.masked_fill(ignored, 0)
    nll = log_sum - shifted.gather(1, target[:, None])[:, 0]
    if p.weight is not None:
        nll = nll * p.weight.to(z.dtype)[target]
    loss = (1 - p.label_smoothing) * nll
    if p.label_smoothing > 0:
        weighted = log_sum[:, None] - shifted
        if p.weight is not None:
            weighted = weighted * p.weight.to(z.dtype)
        loss = loss + p.label_smoothing * weighted.mean(-1)
    if p.z_loss != 0:
        loss = loss + p.z_loss * lse * lse
    return loss.masked_fill(ignored, 0.0), lse


@without_autocast
def cross_entropy_backward(
    p: CrossEntropyProblem, lse: Tensor, dloss: Tensor, dlse: Tensor | None = None
) -> Tensor:
    """dlogits (N, V) in the logits' dtype, from the gradients (N,) of loss and lse.

    dz_c = dloss · ((1 − ε) w_y (p_c − [c = y]) + ε/V Σ_j w_j (p_c − [c = j]) + 2 z_loss lse p_c)
    + dlse · p_c, its first two terms and the z-loss 0 on ignored rows. p is computed from the
    logits' own maximum: at a large offset the rounded lse would be wrong by a factor. p − 1 is
    formed in the accumulator's dtype, before any rounding to the logits'.
    """
    z, slope = _capped_logits(p)
    probabilities = torch.softmax(z, dim=-1)
    ignored = p.target == p.ignore_index
    target = p.target.masked_fill(ignored, 0)[:, None]
    one_hot = torch.zeros_like(z).scatter_(1, target, 1.0)
    dz = (1 - p.label_smoothing) * (probabilities - one_hot)
    if p.weight is not None:
        dz = dz * p.weight.to(z.dtype)[target]
    if p.label_smoothing > 0:
        weight = torch.ones_like(z[0]) if p.weight is None else p.weight.to(z.dtype)
        smooth = weight.sum() * probabilities - weight
        dz = dz + p.label_smoothing / z.shape[1] * smooth
    dz = dz + (2 * p.z_loss * lse)[:, None] * probabilities
    dz = (dz * dloss[:, None]).masked_fill(ignored[:, None], 0.0)
    if dlse is not None:
        dz = dz + dlse[:, None] * probabilities
    return (dz * slope).to(p.logits.dtype)


@without_autocast
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of input (N, C) @ linear_weightᵀ (C, V) + linear_bias (V,): loss, lse (N,).

    The logits exist whole, in the accumulator's dtype, never rounded to the input's.
    """
    dtype = accumulator_dtype(input)
    logits = input.to(dtype) @ linear_weight.to(dtype).mT
    if linear_bias is not None:
        logits = logits + linear_bias.to(dtype)
    return cross_entropy(
        CrossEntropyProblem(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap)
    )


def _capped_logits(p: CrossEntropyProblem) -> tuple[Tensor, Tensor | float]:
    """The softcapped logits in the accumulator's dtype, and their derivative by the logits."""
    z = p.logits.to(accumulator_dtype(p.logits))
    if p.softcap == 0:
        return z, 1.0
    t = torch.tanh(z / p.softcap)
    return p.softcap * t, 1 - t * t
