"""Linear cross-entropy in chunks: logits = x Wᵀ + b for a few hundred rows, in one reused buffer.

The matrix products are torch's or the backend's, and the step between them is its cross-entropy
kernel, which leaves the logits' gradient in the logits' place, or rounded beside them for products
that want it so. Logits and gradients are summed in fp32 whatever the inputs' dtype. On CPUs torch's
products are computed in it too: without matrix units the fp32 product is the faster one (measured
twice as fast as bf16's on Intel's).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, gradient_range
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
    for chunk in _Chunks(p, row.products(p.x.device), workspace_bytes):
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
    chunks = _Chunks(p, row.products(p.x.device), workspace_bytes, gradients=True)
    unit = gradient_range.unit(p, scale) if chunks.in_fp16 else None
    gradients = _Gradients(p, chunks.products, unit, want_dx, want_dw, want_dbias, dx_dtype(p.x))
    dloss = gradients.in_units(scale)
    total = torch.zeros((), dtype=torch.float32, device=p.x.device)
    for chunk in chunks:
        problem = p.of_logits(chunk.logits, chunk.rows)
        loss, _ = row.cross_entropy_fwd(problem, dloss, chunk.dlogits)
        gradients.add(chunk)
        total += loss.sum()
    return total * scale, *gradients.results()


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
    chunks = _Chunks(p, row.products(p.x.device), workspace_bytes, gradients=True)
    unit = gradient_range.unit(p, dloss, dlse, lse) if chunks.in_fp16 else None
    has_bias = p.linear_bias is not None
    gradients = _Gradients(p, chunks.products, unit, True, True, has_bias, p.x.dtype)
    dloss = gradients.in_units(dloss)
    dlse = None if dlse is None else gradients.in_units(dlse)
    for chunk in chunks:
        problem, rows = p.of_logits(chunk.logits, chunk.rows), chunk.rows
        upstream = (dloss[rows], None if dlse is None else dlse[rows])
        row.cross_entropy_bwd(problem, lse[rows], *upstream, chunk.dlogits)
        gradients.add(chunk)
    dx, dw, dbias = gradients.results()
    dtype = p.linear_weight.dtype
    return dx, dw.to(dtype), dbias.to(dtype)


def dx_dtype(x: Tensor) -> torch.dtype:
    """x's own; fp32 for fp16, whose gradients may underflow before the caller's loss scaling."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


class _Chunk(NamedTuple):
    rows: slice
    x: Tensor  # (rows, C), an operand of products
    weight: Tensor  # (V, C), likewise
    logits: Tensor  # (rows, V) fp32; the next chunk overwrites them
    dlogits: Tensor  # (rows, V), in their memory or beside it, rounded or not


class _Chunks:
    """The problem's rows in chunks of about equal size; one chunk of no rows if it has none."""

    def __init__(
        self,
        p: LinearCrossEntropyProblem,
        products: TorchProducts,
        workspace_bytes: int,
        gradients: bool = False,
    ):
        self.p, self.products = p, products
        n, vocab = p.x.shape[0], p.linear_weight.shape[0]
        bytes_each = 4 + (products.gradient_bytes(p.x.dtype) if gradients else 0)
        most = max(1, workspace_bytes // (bytes_each * max(vocab, 1)))
        self.size = -(-n // max(1, -(-n // most)))
        self.logits = self.dlogits = products.logits(self.size, vocab, p.x)
        if gradients:
            self.dlogits = products.gradient(self.logits, p.x.dtype)
        self.in_fp16 = self.dlogits.dtype == torch.float16

    def __iter__(self) -> Iterator[_Chunk]:
        p, n = self.p, self.p.x.shape[0]
        weight = self.products.operand(p.linear_weight)
        for start in range(0, max(n, 1), max(self.size, 1)):
            rows = slice(start, min(start + self.size, n))
            x = self.products.operand(p.x[rows])
            logits, dlogits = (t[: x.shape[0]] for t in (self.logits, self.dlogits))
            self.products.multiply(x, weight.t(), logits)
            if p.linear_bias is not None:
                logits += p.linear_bias
            yield _Chunk(rows, x, weight, logits, dlogits)


class _Gradients:
    """Sums the chunks' contributions to the three gradients, fp32 but for dx.

    Those to come are in units of `unit` (): it is what the sums are multiplied by in the end.
    """

    def __init__(
        self,
        p: LinearCrossEntropyProblem,
        products: TorchProducts,
        unit: Tensor | None,
        want_dx: bool,
        want_dw: bool,
        want_dbias: bool,
        dx_dtype: torch.dtype,
    ):
        self.products, self.unit = products, unit
        self.want_dx, self.want_dw, self.want_dbias = want_dx, want_dw, want_dbias
        self.first = True
        vocab, channels = p.linear_weight.shape
        self.dx = p.x.new_empty(p.x.shape if want_dx else (0,), dtype=dx_dtype)
        self.dw = p.x.new_empty((vocab, channels) if want_dw else (0,), dtype=torch.float32)
        self.dbias = p.x.new_zeros((vocab,) if want_dbias else (0,), dtype=torch.float32)

    def in_units(self, upstream: Tensor) -> Tensor:
        return upstream if self.unit is None else upstream / self.unit

    def add(self, chunk: _Chunk) -> None:
        rows, x, weight, _, dlogits = chunk
        if self.want_dx:
            dx = self.dx[rows]
            sums = dx if dx.dtype == torch.float32 else torch.empty_like(dx, dtype=torch.float32)
            self.products.multiply(dlogits, weight, sums)
            if self.unit is not None:
                torch.mul(sums, self.unit, out=dx)
            elif sums is not dx:
                dx.copy_(sums)
        if self.want_dw:
            self.products.multiply(dlogits.t(), x, self.dw, accumulate=not self.first)
        if self.want_dbias:
            self.dbias += dlogits.sum(0, dtype=torch.float32)
        self.first = False

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dw, dbias."""
        if self.unit is not None:
            self.dw *= self.unit
            self.dbias *= self.unit
        return self.dx, self.dw, self.dbias
