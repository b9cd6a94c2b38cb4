"""Linear cross-entropy in chunks: logits = x Wᵀ + b for a few hundred rows, in one reused buffer.

The matrix products are torch's or the backend's, and the step between them is its cross-entropy
kernel, which leaves the logits' gradient in the logits' place. Logits and gradients are summed in
fp32 whatever the inputs' dtype. On CPUs torch's products are computed in it too: without matrix
units the fp32 product is the faster one (measured twice as fast as bf16's on Intel's).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .problem import LinearCrossEntropyProblem
from .products import TorchProducts

# Logits held at a time. 128 MiB is 667 rows of a 50,257 vocabulary: enough for the products to run
# at full speed (256 rows cost several percent there), and less than two thirds of what one
# 1,024-token sequence takes with plain cross-entropy.
WORKSPACE_BYTES = 128 << 20


def forward(
    p: LinearCrossEntropyProblem, workspace_bytes: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(loss, lse), both (N,) fp32; without chunks where a backend needs no logits for it."""
    row = backends.choose(p, backend)
    if (fused := row.linear_cross_entropy_fwd) is not None:
        return fused(p)
    losses, lses = [], []
    for chunk in _chunks(p, row.products(p.x.device), workspace_bytes):
        loss, lse = row.cross_entropy_fwd(p.of_logits(chunk.logits, chunk.rows), None, None)
        losses.append(loss)
        lses.append(lse)
    return torch.cat(losses), torch.cat(lses)


def forward_backward(
    p: LinearCrossEntropyProblem,
    scale: Tensor,
    want_dx: bool,
    want_dw: bool,
    want_dbias: bool,
    workspace_bytes: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scale · Σ loss, and its gradients dx, dw, dbias); a gradient that isn't wanted is empty.

    dw and dbias are fp32, dx is of dx_dtype(x).
    """
    row = backends.choose(p, backend)
    products = row.products(p.x.device)
    gradients = _Gradients(p, products, want_dx, want_dw, want_dbias, dx_dtype(p.x))
    total = torch.zeros((), dtype=torch.float32, device=p.x.device)
    for chunk in _chunks(p, products, workspace_bytes):
        problem = p.of_logits(chunk.logits, chunk.rows)
        dlogits = products.gradient(chunk.logits, p.x.dtype)
        loss, _ = row.cross_entropy_fwd(problem, scale, dlogits)
        gradients.add(chunk, dlogits)
        total += loss.sum()
    return total * scale, gradients.dx, gradients.dw, gradients.dbias


def backward(
    p: LinearCrossEntropyProblem,
    lse: Tensor,
    dloss: Tensor,
    dlse: Tensor | None,
    workspace_bytes: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, dbias for rowwise upstream gradients; dbias is empty without a bias."""
    row = backends.choose(p, backend)
    products = row.products(p.x.device)
    gradients = _Gradients(p, products, True, True, p.linear_bias is not None, p.x.dtype)
    for chunk in _chunks(p, products, workspace_bytes):
        problem, rows = p.of_logits(chunk.logits, chunk.rows), chunk.rows
        upstream = (dloss[rows], None if dlse is None else dlse[rows])
        dlogits = products.gradient(chunk.logits, p.x.dtype)
        row.cross_entropy_bwd(problem, lse[rows], *upstream, dlogits)
        gradients.add(chunk, dlogits)
    dtype = p.linear_weight.dtype
    return gradients.dx, gradients.dw.to(dtype), gradients.dbias.to(dtype)


def dx_dtype(x: Tensor) -> torch.dtype:
    """x's own; fp32 for fp16, whose gradients may underflow before the caller's loss scaling."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


class _Chunk(NamedTuple):
    rows: slice
    x: Tensor  # (rows, C), an operand of products
    weight: Tensor  # (V, C), likewise
    logits: Tensor  # (rows, V) fp32; the next chunk overwrites them


def _chunks(
    p: LinearCrossEntropyProblem, products: TorchProducts, workspace_bytes: int
) -> Iterator[_Chunk]:
    """The problem's rows in chunks of about equal size; one chunk of no rows if it has none."""
    n, vocab = p.x.shape[0], p.linear_weight.shape[0]
    most = max(1, workspace_bytes // (4 * max(vocab, 1)))
    size = -(-n // max(1, -(-n // most)))
    weight = products.operand(p.linear_weight)
    buffer = p.x.new_empty((size, vocab), dtype=torch.float32)
    for start in range(0, max(n, 1), max(size, 1)):
        rows = slice(start, min(start + size, n))
        x = products.operand(p.x[rows])
        logits = buffer[: x.shape[0]]
        products.multiply(x, weight.t(), logits)
        if p.linear_bias is not None:
            logits += p.linear_bias
        yield _Chunk(rows, x, weight, logits)


class _Gradients:
    """Sums the chunks' contributions to the three gradients, fp32 but for dx."""

    def __init__(
        self,
        p: LinearCrossEntropyProblem,
        products: TorchProducts,
        want_dx: bool,
        want_dw: bool,
        want_dbias: bool,
        dx_dtype: torch.dtype,
    ):
        self.products = products
        self.want_dx, self.want_dw, self.want_dbias = want_dx, want_dw, want_dbias
        self.first = True
        vocab, channels = p.linear_weight.shape
        self.dx = p.x.new_empty(p.x.shape if want_dx else (0,), dtype=dx_dtype)
        self.dw = p.x.new_empty((vocab, channels) if want_dw else (0,), dtype=torch.float32)
        self.dbias = p.x.new_zeros((vocab,) if want_dbias else (0,), dtype=torch.float32)

    def add(self, chunk: _Chunk, dlogits: Tensor) -> None:
        rows, x, weight, _ = chunk
        if self.want_dx:
            dx = self.dx[rows]
            sums = dx if dx.dtype == torch.float32 else torch.empty_like(dx, dtype=torch.float32)
            self.products.multiply(dlogits, weight, sums)
            if sums is not dx:
                dx.copy_(sums)
        if self.want_dw:
            self.products.multiply(dlogits.t(), x, self.dw, accumulate=not self.first)
        if self.want_dbias:
            self.dbias += dlogits.sum(0, dtype=torch.float32)
        self.first = False
