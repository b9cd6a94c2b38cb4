"""Linear cross-entropy in chunks of rows: logits = x Wᵀ + b for a few hundred rows at a time, in one reused buffer.

The matrix products are torch's, the step between them the backend's cross-entropy kernel, which leaves the logits' gradient in
the logits' place. Everything is computed in fp32 whatever the inputs' dtype: without matrix units the fp32 product is the faster
one on CPUs (measured twice as fast as bf16's), and W's gradient needs fp32 sums anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .problem import CrossEntropyProblem

# Logits held at a time. 128 MiB is 667 rows of a 50,257 vocabulary: enough for the products to run at full speed (256 rows cost
# several percent there), and a fifth of what one 1,024-token sequence takes with plain cross-entropy.
WORKSPACE_BYTES = 128 << 20


class LinearCrossEntropyProblem(NamedTuple):
    x: Tensor  # (N, C)
    linear_weight: Tensor  # (V, C)
    linear_bias: Tensor | None  # (V,)
    target: Tensor  # (N,) int64
    weight: Tensor | None = None  # (V,) fp32
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0

    def loss_problem(self, logits: Tensor, rows: slice) -> CrossEntropyProblem:
        return CrossEntropyProblem(logits, self.target[rows], **self.loss_options())

    def loss_options(self) -> dict:
        return dict(zip(self._fields[4:], self[4:], strict=True))


def forward(p: LinearCrossEntropyProblem, workspace_bytes: int, backend: str | None) -> tuple[Tensor, Tensor]:
    """(loss, lse), both (N,) fp32."""
    losses, lses = [], []
    for rows, logits, _ in _chunks(p, p.linear_weight.float(), workspace_bytes):
        problem = p.loss_problem(logits, rows)
        loss, lse = backends.choose(problem, backend).cross_entropy_fwd(problem, None, None)
        losses.append(loss)
        lses.append(lse)
    return torch.cat(losses), torch.cat(lses)


def forward_backward(
    p: LinearCrossEntropyProblem,
    scale: Tensor,
    want_dx: bool,
    want_dw: bool,
    workspace_bytes: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scale · Σ loss, and its gradients dx, dw, dbias); a gradient that isn't wanted is empty.

    dw and dbias are fp32, dx is of dx_dtype(x).
    """
    gradients = _Gradients(p, want_dx, want_dw, dx_dtype(p.x))
    total = torch.zeros((), dtype=torch.float32, device=p.x.device)
    for rows, logits, x in _chunks(p, gradients.weight, workspace_bytes):
        problem = p.loss_problem(logits, rows)
        loss, _ = backends.choose(problem, backend).cross_entropy_fwd(problem, scale, logits)
        gradients.add(rows, logits, x)
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
    gradients = _Gradients(p, True, True, p.x.dtype)
    for rows, logits, x in _chunks(p, gradients.weight, workspace_bytes):
        problem = p.loss_problem(logits, rows)
        upstream = (dloss[rows], None if dlse is None else dlse[rows])
        dlogits = backends.choose(problem, backend).cross_entropy_bwd(problem, lse[rows], *upstream)
        gradients.add(rows, dlogits, x)
    return gradients.dx, gradients.dw.to(p.linear_weight.dtype), gradients.dbias.to(p.linear_weight.dtype)


def dx_dtype(x: Tensor) -> torch.dtype:
    """x's own, but fp32 for fp16: before the caller's loss scaling its gradients would underflow."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _chunks(
    p: LinearCrossEntropyProblem, weight: Tensor, workspace_bytes: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their fp32 logits, their fp32 x) by the fp32 weight: chunks of about equal size, each overwriting the last one's logits."""
    n, vocab = p.x.shape[0], p.linear_weight.shape[0]
    most = max(1, workspace_bytes // (4 * max(vocab, 1)))
    count = max(1, -(-n // most))
    chunk = -(-n // count)
    buffer = torch.empty((chunk, vocab), dtype=torch.float32, device=p.x.device)
    for start in range(0, max(n, 1), max(chunk, 1)):
        rows = slice(start, min(start + chunk, n))
        x = p.x[rows].float()
        logits = torch.mm(x, weight.t(), out=buffer[: x.shape[0]])
        if p.linear_bias is not None:
            logits += p.linear_bias
        yield rows, logits, x


class _Gradients:
    """Sums dlogits' contributions to the three gradients."""

    def __init__(self, p: LinearCrossEntropyProblem, want_dx: bool, want_dw: bool, dx_dtype: torch.dtype):
        self.weight = p.linear_weight.float()
        self.want_dx, self.want_dw, self.want_dbias = want_dx, want_dw, want_dw and p.linear_bias is not None
        self.first = True
        self.dx = p.x.new_empty(p.x.shape if want_dx else (0,), dtype=dx_dtype)
        self.dw = p.x.new_empty(p.linear_weight.shape if want_dw else (0,), dtype=torch.float32)
        vocab = p.linear_weight.shape[0]
        self.dbias = p.x.new_zeros((vocab,) if self.want_dbias else (0,), dtype=torch.float32)

    def add(self, rows: slice, dlogits: Tensor, x: Tensor) -> None:
        if self.want_dx:
            if self.dx.dtype == torch.float32:
                torch.mm(dlogits, self.weight, out=self.dx[rows])
            else:
                self.dx[rows] = torch.mm(dlogits, self.weight)
        if self.want_dw:  # beta = 0 on the first chunk ignores what the fresh memory holds
            torch.addmm(self.dw, dlogits.t(), x, beta=0 if self.first else 1, out=self.dw)
        if self.want_dbias:
            self.dbias += dlogits.sum(0)
        self.first = False
