"""The logits' gradient in fp16, whose numbers end at 65504 below and vanish under 2⁻²⁴.

Training in fp16 scales the loss for this, but linear cross-entropy makes its gradients before that
scale is known, and a mean over N rows has made them small by then: of N = 8192 rows over 50,000
classes most would be 10⁻⁹. So the gradient is written in units of its own, in which the largest
that any element can be is 2¹⁵, and the fp32 results of its products are multiplied by the unit.
The unit comes from bounds, by operations on the device: nothing waits for a GPU.

An element of size g is then rounded by at most 2⁻¹¹ · g, as any to fp16, or by 2⁻⁴⁰ of the bound
where that is more: half of fp16's smallest number, 2⁻²⁴.

With y the target, p the softmax, ε the smoothing, w the class weights, W = max|w| (1 without), and
g, h what loss and lse are multiplied by, a row's gradient is

    p_c·(g·(1 − ε)·w_y + g·ε·mean w + 2·g·z_loss·lse + h) − [c = y]·g·(1 − ε)·w_y − g·ε/V·w_c

times a softcap's slope, which is at most 1. Weights of either sign and V = 2 make it largest:
1.5 · (|g|·(W + 2·z_loss·|lse|) + |h|), and fp16 has room for 1.99 times 2¹⁵.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .problem import LinearCrossEntropyProblem

LARGEST = 2.0**15
LEAST_UNIT = 2.0**-100  # where there is no gradient at all; a factor of 1 / 2⁻¹⁰⁰ is fp32 still


def unit(
    p: LinearCrossEntropyProblem,
    dloss: Tensor,
    dlse: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """() fp32, for these gradients (N,) of the rows' losses and lse, or one () of all losses.

    Without `lse` (N,), for any that the rows may have. Rows whose bound is infinite or NaN don't
    count: so is their gradient to be.
    """
    bound = 1.0 if p.weight is None else _largest(p.weight)
    if p.z_loss > 0:
        bound = bound + 2 * p.z_loss * (_largest_lse(p) if lse is None else lse.abs())
    if dloss.dim() > 0:
        dloss = dloss.where(p.target != p.ignore_index, 0.0)
    bound = dloss.abs() * bound
    if dlse is not None:
        bound = bound + dlse.abs()
    return (_largest(bound) / LARGEST).clamp(min=LEAST_UNIT)


def _largest_lse(p: LinearCrossEntropyProblem) -> Tensor | float:
    """At least |lse| of every row, before there are logits: none is above |x|·|w| + |b|."""
    most_classes = math.log(max(p.linear_weight.shape[0], 1))
    if p.softcap > 0:
        return p.softcap + most_classes
    x, w = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float32) for t in (p.x, p.linear_weight))
    logit = _largest(x.where(p.target != p.ignore_index, 0.0)) * _largest(w)
    if p.linear_bias is not None:
        logit = logit + _largest(p.linear_bias)
    return logit + most_classes


def _largest(t: Tensor) -> Tensor:
    """() fp32: of the finite |t|; 0 if there are none."""
    sizes = t.detach().float().abs().flatten()
    return sizes.where(sizes.isfinite(), 0.0).max() if sizes.numel() else sizes.new_zeros(())
